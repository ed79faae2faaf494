//! A logical unit's reservations: who shuts whom out, RESERVE and RELEASE, PERSISTENT RESERVE OUT and its keeper.

use super::{LogicalUnit, Nexus, State, tell};
use crate::scsi::action::Action;
use crate::scsi::cdb::Command;
use crate::scsi::kept::KeptError;
use crate::scsi::reservation::{Access, InitiatorPort, Keeper, Out, Refused, Reservations};
use crate::scsi::sense::Sense;

impl LogicalUnit {
    /// With persistent reservations that outlive a loss of power; `kept` is what the keeper holds already.
    ///
    /// # Errors
    /// [`KeptError`].
    pub fn with_keeper(mut self, keeper: Box<dyn Keeper>, kept: Option<&str>) -> Result<Self, KeptError> {
        let mut reservations = match kept {
            Some(text) => Reservations::from_text(text, &self.identity.ident)?,
            None => Reservations::default(),
        };
        reservations.allow_keeping();
        let state = self.state.get_mut();
        state.reservations = reservations;
        let held = state.reservations.is_held();
        *self.guarded.get_mut() = held;
        self.keeper = Some(keeper);
        Ok(self)
    }

    /// [`reserve_out`](Self::reserve_out) may wait for a disk.
    pub fn waits_for_keeper(&self) -> bool {
        self.keeper.is_some()
    }

    /// How the command ends because of the state of access or of somebody else's reservation, if it does.
    pub(super) fn refusal(&self, nexus: &Nexus, command: &Command) -> Option<Action> {
        let state = self.state.lock();
        if let Some(sense) = state.access.refuses(command) {
            return Some(Action::Check(sense));
        }
        forbidden(&state, nexus, command).then_some(Action::Conflict)
    }

    /// RESERVE (6), for initiators that know nothing better (SPC-2).
    pub(super) fn reserve(&self, nexus: &Nexus) -> Action {
        // While a registration is on its way to the disk it counts as made.
        let Some(_changing) = self.changing.try_lock() else {
            return Action::Conflict;
        };
        let mut state = self.state.lock();
        if !state.reservations.is_empty() || state.reserved.is_some_and(|holder| holder != nexus.id) {
            return Action::Conflict;
        }
        state.reserved = Some(nexus.id);
        self.guard(&state);
        Action::Good
    }

    pub(super) fn release(&self, nexus: &Nexus) -> Action {
        let mut state = self.state.lock();
        if !state.reservations.is_empty() {
            return Action::Conflict;
        }
        if state.reserved == Some(nexus.id) {
            state.reserved = None;
        }
        self.guard(&state);
        Action::Good
    }

    /// PERSISTENT RESERVE OUT with its parameters; gives the ports whose tasks are to be aborted. Where there is a
    /// keeper it blocks its thread until the change is durable; nobody sees the change before.
    ///
    /// # Errors
    /// [`Refused`]; nothing has changed then.
    pub fn reserve_out(
        &self,
        nexus: &Nexus,
        out: Out,
        parameters: &[u8],
    ) -> Result<Vec<InitiatorPort>, Refused> {
        let _changing = self.changing.lock();
        let old = self.state.lock().reservations.clone();
        let mut new = old.clone();
        let consequences = new.change(&nexus.port, out, parameters)?;
        self.keep(&old, &new)?;
        let mut state = self.state.lock();
        state.reservations = new;
        for (port, sense) in &consequences.attentions {
            for attached in state.attached.values_mut().filter(|a| a.nexus.port == *port) {
                tell(attached, *sense);
            }
        }
        self.guard(&state);
        Ok(consequences.aborts)
    }

    /// Makes a change of the reservations durable, if either the old or the new ones are to be.
    fn keep(&self, old: &Reservations, new: &Reservations) -> Result<(), Refused> {
        let Some(keeper) = &self.keeper else { return Ok(()) };
        let ident = &self.identity.ident;
        let (before, after) = (old.to_text(ident), new.to_text(ident));
        if before == after {
            return Ok(());
        }
        let Err(error) = keeper.keep(&after) else {
            return Ok(());
        };
        let cause = &error as &dyn std::error::Error;
        tracing::error!(target = %self.identity.target, lun = self.number, error = cause, "a persistent reservation cannot be kept; it is refused");
        // The command is refused, so what it asked for must not come back with the next start.
        if let Err(error) = keeper.keep(&before) {
            let cause = &error as &dyn std::error::Error;
            tracing::error!(target = %self.identity.target, lun = self.number, error = cause, "nor can the reservations before it; after a restart either may hold");
        }
        Err(Refused::Check(Sense::INTERNAL))
    }
}

/// Does a reservation of somebody else forbid it?
fn forbidden(state: &State, nexus: &Nexus, command: &Command) -> bool {
    if state.reserved.is_some_and(|holder| holder != nexus.id) {
        return !matches!(
            command,
            Command::Inquiry { .. }
                | Command::ReportLuns { .. }
                | Command::RequestSense { .. }
                | Command::Release
        );
    }
    state.reservations.conflicts(&nexus.port, access(command))
}

/// What a command needs of somebody else's reservation (SPC-4 table 51, SBC-3 table 13).
fn access(command: &Command) -> Access {
    match command {
        Command::Inquiry { .. }
        | Command::TestUnitReady
        | Command::RequestSense { .. }
        | Command::ReportLuns { .. }
        | Command::ReadCapacity10
        | Command::ReadCapacity16 { .. }
        | Command::PersistentReserveIn { .. }
        | Command::PersistentReserveOut { .. }
        | Command::ReportTargetPortGroups { .. }
        | Command::ReportOpcodes { .. }
        | Command::ReportTaskFunctions { .. }
        | Command::StartStop { start: true, .. }
        // They conflict by their own rules.
        | Command::Reserve
        | Command::Release => Access::Always,
        Command::Read { .. }
        | Command::Verify { .. }
        | Command::PreFetch { .. }
        | Command::GetLbaStatus { .. }
        | Command::ReadDefects { .. }
        | Command::ModeSense { .. } => Access::Read,
        _ => Access::Write,
    }
}
