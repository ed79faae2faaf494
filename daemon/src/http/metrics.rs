//! Figures for Prometheus: what a daemon says of itself at the moment it is asked, in the text format 0.0.4.
//!
//! Deliberately absent: figures that are kept for this page. Whoever owns a number owns its counter.

use std::fmt::Write as _;

/// What [`text`] is.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Whether a figure only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It goes up and down.
    Gauge,
    /// It grows, from the daemon's start. Its name ends in `_total`.
    Counter,
}

/// The labels of one sample.
pub type Labels = Vec<(&'static str, String)>;

/// All figures of one name.
#[derive(Debug, Clone, PartialEq)]
pub struct Family {
    /// With the unit behind it: `treeboot_shipped_bytes_total`.
    pub name: &'static str,
    /// What it is, for people.
    pub help: &'static str,
    /// Which kind.
    pub kind: Kind,
    /// A value for each set of labels.
    pub samples: Vec<(Labels, f64)>,
}

impl Family {
    /// A gauge of one sample, without labels.
    #[must_use]
    pub fn gauge(name: &'static str, help: &'static str, value: f64) -> Self {
        Self::gauges(name, help, [(Labels::new(), value)])
    }

    /// A counter of one sample, without labels.
    #[must_use]
    pub fn counter(name: &'static str, help: &'static str, value: f64) -> Self {
        Self::counters(name, help, [(Labels::new(), value)])
    }

    /// A gauge with labels.
    #[must_use]
    pub fn gauges(
        name: &'static str,
        help: &'static str,
        samples: impl IntoIterator<Item = (Labels, f64)>,
    ) -> Self {
        Self {
            name,
            help,
            kind: Kind::Gauge,
            samples: samples.into_iter().collect(),
        }
    }

    /// A counter with labels.
    #[must_use]
    pub fn counters(
        name: &'static str,
        help: &'static str,
        samples: impl IntoIterator<Item = (Labels, f64)>,
    ) -> Self {
        Self {
            kind: Kind::Counter,
            ..Self::gauges(name, help, samples)
        }
    }
}

/// The figures as a scrape reads them.
#[must_use]
pub fn text(families: &[Family]) -> String {
    let mut text = String::new();
    for family in families {
        let kind = match family.kind {
            Kind::Gauge => "gauge",
            Kind::Counter => "counter",
        };
        let (name, help) = (family.name, escaped(family.help, false));
        // Writing to a string does not fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in &family.samples {
            text.push_str(name);
            for (number, (label, word)) in labels.iter().enumerate() {
                let before = if number == 0 { '{' } else { ',' };
                let _ = write!(text, "{before}{label}=\"{}\"", escaped(word, true));
            }
            if !labels.is_empty() {
                text.push('}');
            }
            let _ = writeln!(text, " {value}");
        }
    }
    text
}

/// With what would end a line, or a label's value, written otherwise.
fn escaped(words: &str, quotes: bool) -> String {
    let words = words.replace('\\', "\\\\").replace('\n', "\\n");
    if quotes { words.replace('"', "\\\"") } else { words }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_stand_under_their_names_with_their_labels() {
        let families = [
            Family::gauge("hosts", "Hosts that beat.", 3.0),
            Family::counters(
                "shipped_bytes_total",
                "Sent, by \\ and\nimage",
                [
                    (
                        vec![("image", "a\"b\\c\nd".to_owned()), ("to", "x".to_owned())],
                        7.0,
                    ),
                    (vec![("image", "e".to_owned())], 18_446_744_073_709_551_615_f64),
                    (Vec::new(), 0.25),
                ],
            ),
        ];
        let expected = "# HELP hosts Hosts that beat.\n\
             # TYPE hosts gauge\n\
             hosts 3\n\
             # HELP shipped_bytes_total Sent, by \\\\ and\\nimage\n\
             # TYPE shipped_bytes_total counter\n\
             shipped_bytes_total{image=\"a\\\"b\\\\c\\nd\",to=\"x\"} 7\n\
             shipped_bytes_total{image=\"e\"} 18446744073709552000\n\
             shipped_bytes_total 0.25\n";
        assert_eq!(text(&families), expected);
    }
}
