//! What was read from parents and what from fallbacks, by the kernel's count of each device. A device may come anew, with a count from
//! 0, and a fallback may become a parent: what was read before counts as what it was then. Pure.

use std::collections::HashMap;

use treeboot_dm::DeviceNumber;

/// The counts.
#[derive(Debug, Default)]
pub(super) struct Reads {
    /// From parents and from fallbacks, of devices that are gone and roles that are over.
    past: (u64, u64),
    now: HashMap<DeviceNumber, Role>,
}

/// A device in its role.
#[derive(Debug, Clone, Copy)]
struct Role {
    active: bool,
    /// The kernel's count when it began.
    from: u64,
    /// The kernel's count when it was seen last.
    last: u64,
}

impl Reads {
    /// All devices there are (some perhaps twice), whether each is an active parent's, and the kernel's count.
    pub(super) fn see(&mut self, devices: impl IntoIterator<Item = (DeviceNumber, bool, u64)>) {
        // One session may serve several stripes.
        let devices = devices
            .into_iter()
            .map(|(device, active, count)| (device, (active, count)));
        let devices: HashMap<_, _> = devices.collect();
        let mut before = std::mem::take(&mut self.now);
        for (device, (active, count)) in devices {
            let role = match before.remove(&device) {
                Some(role) if count < role.last => {
                    // Another device of the same number.
                    self.end(role);
                    Role {
                        active,
                        from: 0,
                        last: count,
                    }
                }
                Some(role) if role.active != active => {
                    self.end(Role { last: count, ..role });
                    Role {
                        active,
                        from: count,
                        last: count,
                    }
                }
                Some(role) => Role { last: count, ..role },
                None => Role {
                    active,
                    from: 0,
                    last: count,
                },
            };
            self.now.insert(device, role);
        }
        for role in before.into_values() {
            self.end(role);
        }
    }

    /// Bytes from parents and from fallbacks, as `count` gives them now.
    pub(super) fn totals(&self, count: impl Fn(DeviceNumber) -> Option<u64>) -> (u64, u64) {
        let mut totals = self.past;
        for (device, role) in &self.now {
            let last = count(*device).map_or(role.last, |count| count.max(role.last));
            add(&mut totals, Role { last, ..*role });
        }
        totals
    }

    fn end(&mut self, role: Role) {
        add(&mut self.past, role);
    }
}

fn add(totals: &mut (u64, u64), role: Role) {
    let bytes = role.last.saturating_sub(role.from);
    if role.active {
        totals.0 += bytes;
    } else {
        totals.1 += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn device(minor: u32) -> DeviceNumber {
        DeviceNumber { major: 8, minor }
    }

    #[test]
    fn what_a_fallback_gave_stays_a_fallbacks_when_it_becomes_a_parent() {
        let mut reads = Reads::default();
        reads.see([(device(0), true, 10), (device(1), false, 100)]);
        reads.see([(device(1), true, 150)]);
        assert_eq!(reads.totals(|_| Some(170)), (10 + 20, 150));
        reads.see([(device(1), true, 200)]);
        assert_eq!(reads.totals(|_| None), (10 + 50, 150));
    }

    #[test]
    fn a_device_of_two_stripes_counts_once() {
        let mut reads = Reads::default();
        for count in [10, 20] {
            reads.see([(device(0), true, count), (device(0), true, count)]);
        }
        assert_eq!(reads.totals(|_| None), (20, 0));
    }

    #[test]
    fn a_device_that_comes_anew_counts_from_nothing() {
        let mut reads = Reads::default();
        reads.see([(device(0), true, 100)]);
        reads.see([(device(0), true, 30)]);
        assert_eq!(reads.totals(|_| None), (130, 0));
        reads.see([]);
        assert_eq!(reads.totals(|_| Some(1000)), (130, 0));
    }
}
