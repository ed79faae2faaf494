//! How a host comes into all layers of an image, and how it goes from them.

use treeboot_types::{HostName, StripeIndex};

use super::Grove;
use super::layer::Node;
use super::place::{Around, At};
use super::scope::Scope;

/// Where a host came to stand.
pub(super) struct Entered {
    pub(super) scope: Scope,
    pub(super) home: StripeIndex,
    pub(super) stripes: usize,
}

impl Around<'_> {
    /// Where a host is a member, as its labels say.
    pub(super) fn scope_for(&self, host: &HostName) -> Scope {
        let labels = self.hosts.get(host).map(|host| &host.info.labels);
        labels.map_or(Scope::Fleet, Scope::of)
    }

    /// Puts a host into all its stripes, in the free slots nearest the roots, and its rack and zone if it is the first of them.
    /// None where there is no room at all; nothing of it is left then.
    pub(super) fn enter(&self, grove: &mut Grove, host: &HostName, joined: u64) -> Option<Entered> {
        let (scope, stripes) = (self.scope_for(host), self.stands_in(grove, host));
        let all: Vec<usize> = (0..stripes).collect();
        let mut has_room = true;
        for group in scope.outward().into_iter().rev() {
            if let Some(outer) = group.outer() {
                let home = grove.groups.get(&group).copied();
                let home = home.unwrap_or_else(|| self.home_for(grove, &outer, stripes));
                grove.groups.insert(group.clone(), home);
                let member = Node::Group(group);
                has_room = has_room && self.enter_scope(grove, &outer, &member, home, joined, &all);
            }
        }
        let home = self.home_for(grove, &scope, stripes);
        let member = Node::Host(host.clone());
        has_room = has_room && self.enter_scope(grove, &scope, &member, home, joined, &all);
        if !has_room {
            self.go(grove, host, &scope);
            return None;
        }
        Some(Entered { scope, home, stripes })
    }

    /// Puts a member into those of the stripes that it does not stand in yet.
    pub(super) fn enter_scope(
        &self,
        grove: &mut Grove,
        scope: &Scope,
        member: &Node,
        home: StripeIndex,
        joined: u64,
        stripes: &[usize],
    ) -> bool {
        let is_absent = |stripe: &usize| {
            let layer = grove.layer(*stripe, scope);
            layer.is_none_or(|layer| layer.get(member).is_none())
        };
        let stripes: Vec<usize> = stripes.iter().copied().filter(is_absent).collect();
        self.make_room_for(grove, scope, member, home, &stripes);
        stripes.into_iter().all(|stripe| {
            if let (Node::Group(group), Some(tree)) = (member, grove.stripes.get_mut(stripe)) {
                let entrance = tree.open(group);
                entrance.insert_root(Node::Entrance, self.settings.shares(1));
            }
            self.admit(grove, At { stripe, scope }, member, home, joined)
        })
    }

    /// Takes a host out of all layers, and its rack and zone where nobody is left in them.
    pub(super) fn go(&self, grove: &mut Grove, host: &HostName, scope: &Scope) {
        let all: Vec<usize> = (0..grove.stripes.len()).collect();
        self.go_from(grove, scope, &Node::Host(host.clone()), &all);
        let mut scope = scope.clone();
        while let Some(outer) = scope.outer() {
            let is_left = |stripe: &&usize| {
                let layer = grove.layer(**stripe, &scope);
                layer.is_some_and(|layer| layer.count() == 0)
            };
            let left: Vec<usize> = all.iter().filter(is_left).copied().collect();
            let group = Node::Group(scope.clone());
            self.stay_inner(grove, &outer, &group, &left);
            self.go_from(grove, &outer, &group, &left);
            for stripe in left {
                if let Some(tree) = grove.stripes.get_mut(stripe) {
                    tree.close(&scope);
                }
            }
            if grove.stands_in(&group) == 0 {
                grove.groups.remove(&scope);
            }
            scope = outer;
        }
    }

    fn go_from(&self, grove: &mut Grove, scope: &Scope, member: &Node, stripes: &[usize]) {
        self.make_up_for(grove, scope, member, stripes);
        for &stripe in stripes {
            self.vacate(grove, At { stripe, scope }, member);
        }
    }
}
