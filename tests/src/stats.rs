//! Medians with their intervals: no assumption about how times are spread.

use serde::Serialize;

/// A median and where the true one lies.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Median {
    /// The sample's.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// The chance that the interval holds the true median, from the binomial distribution of ranks.
    pub confidence: f64,
}

/// The interval is the narrowest pair of ranks that holds the true median with at least this chance.
const CONFIDENCE: f64 = 0.95;

impl Median {
    /// Of a sample; `None` of an empty one. With fewer than six values even the whole range is less sure than 95 %, and
    /// `confidence` says so.
    #[must_use]
    pub fn of(sample: &[f64]) -> Option<Self> {
        let mut sorted = sample.to_vec();
        sorted.sort_by(f64::total_cmp);
        let n = sorted.len();
        let (first, last) = (sorted.first()?, sorted.last()?);
        let median = f64::midpoint(sorted[(n - 1) / 2], sorted[n / 2]);
        let mut best = Self {
            median,
            low: *first,
            high: *last,
            confidence: coverage(n, 0),
        };
        for rank in 1..n / 2 {
            let confidence = coverage(n, rank);
            if confidence < CONFIDENCE {
                break;
            }
            best = Self {
                median,
                low: sorted[rank],
                high: sorted[n - 1 - rank],
                confidence,
            };
        }
        Some(best)
    }
}

/// The chance that the true median lies between the values of rank `rank` from below and from above (both from 0) of `n`.
fn coverage(n: usize, rank: usize) -> f64 {
    let mut outside = 0.0;
    let mut chance = 0.5_f64.powi(i32::try_from(n).unwrap_or(i32::MAX));
    for below in 0..=rank {
        outside += chance;
        chance *= (n - below) as f64 / (below + 1) as f64;
    }
    1.0 - 2.0 * outside
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_median_is_that_of_the_sign_test() {
        let sample: Vec<f64> = (1..=9).map(f64::from).collect();
        let median = Median::of(&sample).expect("not empty");
        // Ranks 2 and 8 of nine hold the median with 1 - 2 × (1 + 9) / 512.
        assert_eq!((median.median, median.low, median.high), (5.0, 2.0, 8.0));
        assert!((median.confidence - (1.0 - 20.0 / 512.0)).abs() < 1e-12);
        let few = Median::of(&[1.0, 3.0]).expect("not empty");
        assert_eq!(
            (few.median, few.low, few.high, few.confidence),
            (2.0, 1.0, 3.0, 0.5)
        );
        assert_eq!(Median::of(&[]), None);
    }
}
