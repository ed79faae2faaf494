//! The same call to many hosts at once, within a bound, and what to exit with when some fail.

use std::future::Future;

use futures_util::stream::{self, StreamExt};

use crate::failure::{Exit, Failure};
use crate::output;

/// Runs `call` on every item, at most `limit` at once; the results keep the items' order.
pub(crate) async fn each<T, R, F, C>(items: Vec<T>, limit: usize, call: C) -> Vec<R>
where
    F: Future<Output = R>,
    C: Fn(T) -> F,
{
    stream::iter(items)
        .map(call)
        .buffered(limit.max(1))
        .collect()
        .await
}

/// The failure of a verb that did `count` things, of which those in `failures` failed: none is no failure, the only
/// one keeps its own code, all or some of several say so and list their causes.
///
/// # Errors
/// At least one failed.
pub(crate) fn verdict(what: &str, count: usize, failures: &[Failure]) -> Result<(), Failure> {
    /// How many causes are listed: more do not help.
    const LISTED: usize = 20;
    let mut failure = match (brief(what, count, failures), failures) {
        (Err(failure), [_, ..]) if count > 1 => failure,
        (result, _) => return result,
    };
    let mut causes: Vec<&str> = failures.iter().map(|failure| failure.what.as_str()).collect();
    causes.sort_unstable();
    causes.dedup();
    for cause in causes.iter().take(LISTED) {
        failure.what += &format!("\n  {cause}");
    }
    if causes.len() > LISTED {
        failure.what += &format!("\n  and {} more", causes.len() - LISTED);
    }
    Err(failure)
}

/// The same where the result has listed the causes already.
///
/// # Errors
/// At least one failed.
pub(crate) fn brief(what: &str, count: usize, failures: &[Failure]) -> Result<(), Failure> {
    match (failures, count) {
        ([], _) => Ok(()),
        ([only], 1) => Err(only.clone()),
        _ => {
            let exit = if failures.len() == count {
                Exit::Failed
            } else {
                Exit::Partly
            };
            let text = format!("{} of {} failed", failures.len(), output::plural(count, what));
            let advice = failures.iter().find_map(|failure| failure.advice.clone());
            Err(Failure {
                exit,
                what: text,
                advice,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_of_several_is_partly_and_a_single_one_keeps_its_code() {
        let failure = |what: &str| Failure::new(Exit::NotFound, what);
        assert!(verdict("host", 2, &[]).is_ok());
        assert_eq!(
            verdict("host", 1, &[failure("a")]).unwrap_err().exit,
            Exit::NotFound
        );
        let partly = verdict("host", 3, &[failure("b"), failure("a")]).unwrap_err();
        assert_eq!(
            (partly.exit, partly.what.as_str()),
            (Exit::Partly, "2 of 3 hosts failed\n  a\n  b")
        );
        assert_eq!(
            verdict("host", 2, &[failure("a"), failure("a")])
                .unwrap_err()
                .exit,
            Exit::Failed
        );
    }

    #[tokio::test]
    async fn results_keep_the_order_of_the_items() {
        let doubled = each(vec![3, 1, 2], 2, |item| async move { item * 2 }).await;
        assert_eq!(doubled, [6, 2, 4]);
    }
}
