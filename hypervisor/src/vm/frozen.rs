//! A guest whose file systems are held still for a moment, by its own agent.

use serde_json::{Value, json};

use super::RunningVm;
use crate::command::AGENT_CHARDEV;
use crate::guest_agent::{GuestAgent, GuestAgentError, LIMITS};
use crate::qmp::Qmp;

impl RunningVm {
    /// Whether a program of the guest has its end of the channel open. Nothing is asked of it.
    ///
    /// # Errors
    /// [`GuestAgentError`]: nobody does, or there is no channel.
    async fn find_guest_agent(&self) -> Result<(), GuestAgentError> {
        let answer = Qmp::ask(&self.dir().qmp(), "query-chardev", json!({})).await?;
        let devices = answer.as_array().map(Vec::as_slice).unwrap_or_default();
        let channel = devices
            .iter()
            .find(|device| device.get("label").and_then(Value::as_str) == Some(AGENT_CHARDEV));
        let vm = || self.spec.name.clone();
        match channel.map(|channel| channel.get("frontend-open").and_then(Value::as_bool)) {
            None => Err(GuestAgentError::NoChannel { vm: vm() }),
            Some(Some(true)) => Ok(()),
            Some(_) => Err(GuestAgentError::Nobody { vm: vm() }),
        }
    }

    /// Speaks to the guest's agent, which answered.
    ///
    /// # Errors
    /// [`GuestAgentError`]; nothing was asked of the guest.
    pub async fn guest_agent(&self) -> Result<GuestAgent, GuestAgentError> {
        self.find_guest_agent().await?;
        GuestAgent::connect(&self.dir().agent(), LIMITS).await
    }

    /// Has the guest go on. Nothing happens to one that does. Returns how many file systems were held still.
    ///
    /// # Errors
    /// [`GuestAgentError`]; they may be held still.
    pub async fn thaw(&self) -> Result<u64, GuestAgentError> {
        let mut agent = GuestAgent::connect(&self.dir().agent(), LIMITS).await?;
        agent.thaw().await
    }
}
