//! Sizes, durations and names as a person reads and writes them.

use std::cmp::Ordering;
use std::time::Duration;

/// A size in bytes with a binary unit and three digits: `1.50 GiB`, `12.5 MiB`, `512 B`.
pub(crate) fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would print as "1024 KiB".
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = if value < 9.995 {
        2
    } else {
        usize::from(value < 99.95)
    };
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A duration with a unit that suits it: `850 µs`, `12.3 ms`, `4.56 s`, `2 min 5 s`, `3 h 0 min`.
pub(crate) fn duration(duration: Duration) -> String {
    let us = duration.as_micros();
    let seconds = duration.as_secs_f64();
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        1_000_000..10_000_000 => format!("{seconds:.2} s"),
        10_000_000..60_000_000 => format!("{seconds:.1} s"),
        60_000_000..3_600_000_000 => format!("{} min {} s", seconds as u64 / 60, seconds as u64 % 60),
        _ => format!("{} h {} min", seconds as u64 / 3600, seconds as u64 / 60 % 60),
    }
}

/// Reads `30`, `30s`, `500ms`, `5m` or `1h`; a bare number is seconds.
///
/// # Errors
/// What is wrong and how to write it.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is not a time; write for instance 30s, 500ms, 5m or 1h");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let ms = match unit {
        "ms" => Some(number),
        "" | "s" => number.checked_mul(1_000),
        "m" | "min" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        _ => None,
    };
    // A year: longer ones are slips of the finger, and would overflow timers.
    const LONGEST_MS: u64 = 365 * 24 * 3_600_000;
    match ms {
        Some(ms) if (1..=LONGEST_MS).contains(&ms) => Ok(Duration::from_millis(ms)),
        _ => Err(wrong()),
    }
}

/// `1 VM`, `2 VMs`.
pub(crate) fn plural(count: usize, noun: &str) -> String {
    if count == 1 {
        format!("1 {noun}")
    } else {
        format!("{count} {noun}s")
    }
}

/// The text with everything that could steer a terminal replaced by `?`: what a network peer sends is shown to a
/// person only like this.
pub(crate) fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '?' } else { c })
        .collect()
}

/// Compares names as people number things: `host-2` before `host-10`.
pub(crate) fn natural(a: &str, b: &str) -> Ordering {
    let (mut left, mut right) = (a, b);
    loop {
        let (Some(x), Some(y)) = (left.chars().next(), right.chars().next()) else {
            return left.len().cmp(&right.len()).then_with(|| a.cmp(b));
        };
        let order = if x.is_ascii_digit() && y.is_ascii_digit() {
            let (number, rest) = leading_number(left);
            let (other, other_rest) = leading_number(right);
            (left, right) = (rest, other_rest);
            // Without leading zeros the longer number is the greater one.
            number.len().cmp(&other.len()).then_with(|| number.cmp(other))
        } else {
            left = &left[x.len_utf8()..];
            right = &right[y.len_utf8()..];
            x.cmp(&y)
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// The digits that `text` begins with, without leading zeros, and what follows them.
fn leading_number(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (text[..end].trim_start_matches('0'), &text[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_keep_three_digits() {
        for (size, expect) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (1536 * 1024, "1.50 MiB"),
            (12 * 1024 * 1024 + 512 * 1024, "12.5 MiB"),
            (999 * 1024 * 1024, "999 MiB"),
            ((1 << 30) - 1, "1.00 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(size), expect, "{size}");
        }
    }

    #[test]
    fn durations_have_a_unit_that_suits() {
        for (us, expect) in [
            (850, "850 µs"),
            (12_345, "12.3 ms"),
            (4_560_000, "4.56 s"),
            (45_600_000, "45.6 s"),
            (125_000_000, "2 min 5 s"),
            (10_800_000_000, "3 h 0 min"),
        ] {
            assert_eq!(duration(Duration::from_micros(us)), expect);
        }
    }

    #[test]
    fn names_sort_as_people_number_them() {
        let mut names = vec![
            "b",
            "host-10",
            "host-2",
            "host-1-b",
            "host-02",
            "host-1",
            "host",
            "10.0.0.10",
            "10.0.0.2",
        ];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(
            names,
            [
                "10.0.0.2",
                "10.0.0.10",
                "b",
                "host",
                "host-1",
                "host-1-b",
                "host-02",
                "host-2",
                "host-10"
            ]
        );
    }

    #[test]
    fn times_are_read_with_or_without_a_unit() {
        for (text, ms) in [
            ("30", 30_000),
            ("30s", 30_000),
            ("500ms", 500),
            ("5m", 300_000),
            ("1h", 3_600_000),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for bad in [
            "",
            "s",
            "-1",
            "1.5",
            "0",
            "1 s",
            "10 weeks",
            "99999999999999999999",
            "9999999h",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }
}
