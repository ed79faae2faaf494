//! What a guest saw of somebody's death: the longest time between two of its reads or writes.

use treeboot_tests::stats::Median;

/// Shorter ones are told of no more than this.
pub(super) const LEAST_MS: u64 = 20;

/// Prints what [`Seen::parse`] reads, of a log of fio's: a line for each time between two entries that is at least as long as that, then from when to when the log goes.
pub(super) const AWK: &str = r#"{ if (NR > 1 && $1 - last >= least) print "GAP", $1, $1 - last; if (NR == 1) first = $1; last = $1 }
END { if (NR > 1) print "SPAN", first, last }"#;

/// One writer's or reader's time without an end of its own in it; all times in ms since 1970.
#[derive(Debug, Default)]
struct Span {
    from: u64,
    to: u64,
    /// When it ended, and how long it was.
    gaps: Vec<(u64, u64)>,
}

/// All that a guest saw.
#[derive(Debug, Default)]
pub(super) struct Seen(Vec<Span>);

impl Seen {
    /// From what a guest printed.
    pub(super) fn parse(output: &str) -> Self {
        let (mut spans, mut gaps) = (Vec::new(), Vec::new());
        for line in output.lines() {
            let mut words = line.split_whitespace();
            let kind = words.next();
            let mut number = || words.next().and_then(|word| word.parse().ok());
            let (Some(first), Some(second)) = (number(), number()) else {
                continue;
            };
            match kind {
                Some("GAP") => gaps.push((first, second)),
                Some("SPAN") => spans.push(Span {
                    from: first,
                    to: second,
                    gaps: std::mem::take(&mut gaps),
                }),
                _ => {}
            }
        }
        Self(spans)
    }

    /// From the times at which something was seen to go on.
    pub(super) fn at(times: &[u64]) -> Self {
        let gaps = times.iter().zip(times.iter().skip(1));
        let gaps = gaps.map(|(from, to)| (*to, to.saturating_sub(*from)));
        let (Some(from), Some(to)) = (times.first(), times.last()) else {
            return Self::default();
        };
        Self(vec![Span {
            from: *from,
            to: *to,
            gaps: gaps.filter(|(_, gap)| *gap >= LEAST_MS).collect(),
        }])
    }

    /// The longest one that ended within a time; `None` where nobody wrote or read all through it.
    fn longest(&self, from: u64, to: u64) -> Option<u64> {
        let through = self.0.iter().filter(|span| span.from <= from && to <= span.to);
        let within = |(at, _): &&(u64, u64)| (from..=to).contains(at);
        through
            .map(|span| {
                span.gaps
                    .iter()
                    .filter(within)
                    .map(|(_, gap)| *gap)
                    .max()
                    .unwrap_or(0)
            })
            .max()
    }
}

/// Something that was done to a guest's disk, from when to when.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) what: &'static str,
    pub(super) from: u64,
    pub(super) to: u64,
}

/// A line for each kind of round.
pub(super) fn table(front_end: &str, rounds: &[Round], seen: &Seen) -> String {
    let mut kinds: Vec<&str> = Vec::new();
    for round in rounds {
        if !kinds.contains(&round.what) {
            kinds.push(round.what);
        }
    }
    let mut table = String::from("| front end | what happened | times | seen | median | longest |\n");
    for kind in kinds {
        let of_kind: Vec<_> = rounds.iter().filter(|round| round.what == kind).collect();
        let pauses = of_kind
            .iter()
            .filter_map(|round| seen.longest(round.from, round.to));
        let pauses: Vec<f64> = pauses.map(|pause| pause as f64).collect();
        let shown = |pause: Option<f64>| match pause {
            None => "-".to_owned(),
            Some(pause) if pause < LEAST_MS as f64 => format!("< {LEAST_MS} ms"),
            Some(pause) => format!("{pause:.0} ms"),
        };
        table += &format!(
            "| {front_end} | {kind} | {} | {} | {} | {} |\n",
            of_kind.len(),
            pauses.len(),
            shown(Median::of(&pauses).map(|median| median.median)),
            shown(pauses.iter().copied().reduce(f64::max)),
        );
    }
    table
}

#[test]
fn a_pause_belongs_to_the_round_in_which_it_ends() {
    let seen = Seen::parse("GAP 1500 300\nGAP 1900 25\nSPAN 1000 2000\nGAP 2600 40\nSPAN 2200 3000\nwords\n");
    assert_eq!(seen.longest(1100, 1150), Some(0));
    assert_eq!(seen.longest(1300, 1510), Some(300));
    assert_eq!(seen.longest(1400, 1950), Some(300));
    assert_eq!(seen.longest(1510, 1950), Some(25));
    assert_eq!(seen.longest(1990, 2100), None, "nobody was at work all the time");
    assert_eq!(Seen::at(&[10, 15, 100]).longest(12, 100), Some(85));
}
