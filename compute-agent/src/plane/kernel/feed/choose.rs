//! Which devices a stripe's reads go to: values from values.

use std::collections::HashSet;
use std::time::Duration;

use treeboot_dm::DeviceNumber;

use super::StripeDevices;
use crate::stack::{PathTo, Sources, StripePaths};

/// How long reads wait for parents that are named and not up yet before they go to a fallback. A parent is often only about to export, and
/// a fleet whose hosts all read from the origin until their parents are up is what the tree is to prevent.
pub(super) const PATIENCE: Duration = Duration::from_secs(8);

/// A stripe for which nothing was loaded yet.
pub(super) static NOTHING: StripeDevices = StripeDevices {
    active: Vec::new(),
    fallbacks: Vec::new(),
};

/// The devices of the paths, as far as `device` has one for them; none stands twice, because multipath takes each once.
///
/// While `patient`, a stripe none of whose parents has a device gets no fallback that was not `loaded` before: its reads wait.
pub(super) fn choose(
    paths: &StripePaths,
    loaded: &StripeDevices,
    patient: bool,
    device: impl Fn(&PathTo) -> Option<DeviceNumber>,
) -> StripeDevices {
    let mut taken = HashSet::new();
    let mut devices = |paths: &[PathTo]| -> Vec<DeviceNumber> {
        let found = paths.iter().filter_map(&device);
        found.filter(|device| taken.insert(*device)).collect()
    };
    let active = devices(&paths.active);
    let mut fallbacks = devices(&paths.fallbacks);
    if patient && active.is_empty() && !paths.active.is_empty() {
        fallbacks.retain(|device| loaded.holds(*device));
    }
    StripeDevices { active, fallbacks }
}

/// Every path: its stripe, whether it is a parent's, and where it leads.
pub(super) fn all(sources: &Sources) -> impl Iterator<Item = (u32, bool, &PathTo)> {
    (0u32..).zip(&sources.stripes).flat_map(|(stripe, paths)| {
        let active = paths.active.iter().map(move |path| (stripe, true, path));
        active.chain(paths.fallbacks.iter().map(move |path| (stripe, false, path)))
    })
}

/// Whether the same parents are named, whatever the fallbacks.
pub(super) fn same_parents(a: &Sources, b: &Sources) -> bool {
    let parents = |sources: &Sources| -> Vec<Vec<PathTo>> {
        let stripes = sources.stripes.iter();
        stripes.map(|stripe| stripe.active.clone()).collect()
    };
    parents(a) == parents(b)
}

#[cfg(test)]
mod tests {
    use treeboot_types::{Endpoint, ImageId, ImageName, Iqn, PathPolicy, Portal};

    use super::*;

    /// A path whose device, where it has one, is of this number.
    fn path(number: u32) -> PathTo {
        let image = ImageId {
            name: ImageName::new("image").unwrap(),
            version: 1,
        };
        PathTo {
            host: None,
            endpoint: Endpoint {
                portal: Portal::new(&format!("10.0.0.{number}:3260")).unwrap(),
                target: Iqn::of_image(&image),
                data_lun: 0,
                hash_lun: Some(1),
            },
        }
    }

    fn device(minor: u32) -> DeviceNumber {
        DeviceNumber { major: 8, minor }
    }

    #[test]
    fn a_stripe_waits_for_its_parents_a_while_and_leaves_no_fallback_that_it_reads_from() {
        let paths = StripePaths {
            active: vec![path(1)],
            fallbacks: vec![path(2), path(3)],
            policy: PathPolicy::RoundRobin,
        };
        let cases = [
            // Which have devices, which were loaded, patient; parents, fallbacks.
            (vec![1, 2, 3], vec![], true, vec![1], vec![2, 3]),
            (vec![2, 3], vec![], true, vec![], vec![]),
            (vec![2, 3], vec![], false, vec![], vec![2, 3]),
            (vec![2, 3], vec![3], true, vec![], vec![3]),
            (vec![1, 3], vec![2], false, vec![1], vec![3]),
        ];
        for (there, loaded, patient, active, fallbacks) in cases {
            let before = StripeDevices {
                active: Vec::new(),
                fallbacks: loaded.iter().copied().map(device).collect(),
            };
            let chosen = choose(&paths, &before, patient, |wanted| {
                let number = there.iter().find(|number| path(**number) == *wanted)?;
                Some(device(*number))
            });
            let expected = StripeDevices {
                active: active.into_iter().map(device).collect(),
                fallbacks: fallbacks.into_iter().map(device).collect(),
            };
            assert_eq!(chosen, expected, "{there:?} {loaded:?} {patient}");
        }
    }

    #[test]
    fn no_device_stands_twice() {
        let paths = StripePaths {
            active: vec![path(1), path(2)],
            fallbacks: vec![path(3)],
            policy: PathPolicy::RoundRobin,
        };
        let chosen = choose(&paths, &NOTHING, false, |_| Some(device(7)));
        assert_eq!(chosen.active, [device(7)]);
        assert!(chosen.fallbacks.is_empty());
    }
}
