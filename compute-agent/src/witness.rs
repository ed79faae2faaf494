//! Who is told of each thing that the agent does, right before it and right after it: nobody, or a test that ends the agent there.
//! Whatever an agent may be killed between is between two of these moments.

use std::fmt;
use std::sync::Arc;

/// A moment: the name of a step or a change of the journal, and whether it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment<'a> {
    /// Of the step or the change.
    pub what: &'a str,
    /// Whether it ended, well or not.
    pub after: bool,
}

impl fmt::Display for Moment<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let when = if self.after { "after" } else { "before" };
        write!(f, "{when} {}", self.what)
    }
}

type Told = dyn Fn(Moment<'_>) + Send + Sync;

/// Who is told; without anybody it costs nothing.
#[derive(Clone, Default)]
pub struct Witness(Option<Arc<Told>>);

impl fmt::Debug for Witness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Witness").field(&self.0.is_some()).finish()
    }
}

impl Witness {
    /// Somebody, who may be told from several threads at once. The agent waits for its return.
    pub fn new(told: impl Fn(Moment<'_>) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(told)))
    }

    /// Does something before two witnessed moments.
    pub(crate) async fn around<T>(&self, what: &str, done: impl Future<Output = T>) -> T {
        let tell = |after| {
            if let Some(told) = &self.0 {
                told(Moment { what, after });
            }
        };
        tell(false);
        let result = done.await;
        tell(true);
        result
    }
}
