//! What goes wrong.

use treeboot_coordinator::tree::Call;
use treeboot_types::{BadParent, StripeIndex};

use super::super::host::Message;
use super::super::scenario::{BEAT_MS, FAULTS_MS, Fault, Kind};
use super::super::volt::Request;
use super::{Event, World};

impl World {
    pub(super) fn fault(&mut self, fault: &Fault) {
        self.say(|_| format!("fault: {:?}", fault.kind));
        self.counts.faults += 1;
        let now = self.now;
        let until = move |ms: u64| (now + ms).min(FAULTS_MS);
        match &fault.kind {
            Kind::Crash { host, ms, power } => {
                let back = until(*ms);
                self.kill(*host, *power);
                self.at(back, Event::Boot(*host));
            }
            Kind::Die { host } => {
                self.kill(*host, true);
                self.hosts[*host].gone = true;
                self.hosts[*host].wanted = false;
            }
            Kind::Detach { host, ms } => {
                if self.hosts[*host].wanted && self.hosts[*host].up {
                    self.hosts[*host].wanted = false;
                    self.tell(*host, Message::Detach);
                    if *ms > 0 {
                        self.at(until(*ms), Event::Want(*host));
                    }
                }
            }
            Kind::Leave { host } => {
                let speaker = self.hosts[*host].speaker();
                self.kill(*host, false);
                self.hosts[*host].gone = true;
                self.hosts[*host].wanted = false;
                let id = self.fresh();
                let ms = self.delay() + 50;
                self.after(
                    ms,
                    Event::Up(Request::Call(id, Box::new(Call::Leave { speaker }))),
                );
            }
            Kind::Cut { hosts, ms } => {
                let end = until(*ms);
                for &host in hosts {
                    self.cut[host] = self.cut[host].max(end);
                }
            }
            Kind::Split { hosts, ms } => {
                let mut side = vec![false; self.hosts.len()];
                hosts.iter().for_each(|&host| side[host] = true);
                self.splits.push((until(*ms), side));
            }
            Kind::Break { host } => {
                if self.hosts[*host].line.is_some() {
                    self.lose(*host);
                }
            }
            // The last ones are taken in before the end.
            Kind::WrongBytes { host } if self.now + 3 * BEAT_MS < FAULTS_MS => self.complain(*host),
            Kind::WrongBytes { .. } => {}
            Kind::DieAtWrite { write, before, ms } => {
                if self.volt.up && self.volt.dies_at.is_none() {
                    self.volt.dies_at = Some((*write, *before, *ms));
                }
            }
            Kind::Pause { ms } => {
                if self.volt.up {
                    let from = self.volt.paused_until.max(self.now);
                    self.volt.paused_until = from.max(until(*ms));
                    self.memory.pauses.push((from, self.volt.paused_until - from));
                }
            }
            Kind::Full { ms } => self.volt.full_until = until(*ms),
        }
    }

    pub(super) fn kill(&mut self, host: usize, power: bool) {
        if !self.hosts[host].up {
            return;
        }
        if let Some(conn) = self.hosts[host].line.as_ref().map(|line| line.conn) {
            self.broken.insert(conn);
            // A process's sockets are closed for it; those of a machine without power are not.
            if !power && !self.is_cut(host) {
                let ms = self.delay();
                self.after(ms, Event::Up(Request::Closed(conn)));
            }
        }
        self.hosts[host].die(power);
    }

    pub(super) fn complain(&mut self, host: usize) {
        let place = self.hosts[host].place().cloned();
        let Some(place) = place.filter(|place| !place.stripes.is_empty()) else {
            return;
        };
        let stripe = self.chance.one_of(place.stripes.len());
        let active = &place.stripes[stripe].active;
        let parent = &active[self.chance.one_of(active.len())].path;
        let complaint = BadParent {
            image: self.image.clone(),
            stripe: StripeIndex(stripe as u16),
            host: parent.host.clone(),
            portal: parent.endpoint.portal.to_string(),
            fault: treeboot_types::Fault::WrongBytes,
            count: 1,
        };
        self.hosts[host].complaints.push(complaint);
    }
}
