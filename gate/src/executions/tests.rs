use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::*;

fn execution(id: &str, lease: &str, principal: &str) -> Execution {
    Execution {
        id: id.to_owned(),
        action_id: "a".to_owned(),
        principal: principal.to_owned(),
        listener: "agent".to_owned(),
        lease_jti: lease.to_owned(),
        session_id: "s".to_owned(),
        decision_id: "d".to_owned(),
        trace_id: "t".to_owned(),
        started_at: Timestamp::now(),
        phase: Phase::Waiting,
        leaf: None,
    }
}

fn is_ready(future: impl Future) -> bool {
    let mut context = Context::from_waker(Waker::noop());
    matches!(pin!(future).poll(&mut context), Poll::Ready(_))
}

#[tokio::test]
async fn one_is_killed_and_no_other() {
    let all = Executions::default();
    let (one, other) = (all.register(execution("1", "l", "p")), all.register(execution("2", "l", "p")));
    one.running(7);
    let killing = all.kill("1", "op", Some("too slow")).unwrap();
    assert_eq!((killing.execution().phase, killing.execution().leaf), (Phase::Running, Some(7)));
    assert!(is_ready(one.killed()));
    assert!(!is_ready(other.killed()));
    // Who was first stands.
    all.kill("1", "another", None).unwrap();
    let killed = one.ending().unwrap();
    assert_eq!((killed.by.as_str(), killed.why.as_deref()), ("op", Some("too slow")));
    assert_eq!(other.ending(), None);

    let gone = tokio::spawn(killing.gone());
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(!gone.is_finished(), "it is there while its guard is");
    drop(one);
    tokio::time::timeout(Duration::from_secs(5), gone).await.unwrap().unwrap();
    assert_eq!(all.list().iter().map(|left| left.id.as_str()).collect::<Vec<_>>(), ["2"]);
    assert_eq!(all.kill("1", "op", None).unwrap_err(), NotKilled::NotRunning);
}

#[test]
fn a_kill_that_comes_too_late_is_told_so() {
    let all = Executions::default();
    let one = all.register(execution("1", "l", "p"));
    assert_eq!(one.ending(), None);
    assert_eq!(all.kill("1", "op", None).unwrap_err(), NotKilled::Ending);
    assert!(all.kill_where("op", None, |_| true).is_empty());
    assert!(!is_ready(one.killed()));
}

#[test]
fn what_is_revoked_is_ended_together() {
    let all = Executions::default();
    let held: Vec<Registered> = [("1", "l1", "p"), ("2", "l2", "p"), ("3", "l1", "p")]
        .map(|(id, l, p)| all.register(execution(id, l, p)))
        .into();
    let ended = all.kill_where("revocation", Some("lease revoked"), |execution| execution.lease_jti == "l1");
    let ids: Vec<&str> = ended.iter().map(|one| one.execution().id.as_str()).collect();
    assert_eq!(ids, ["1", "3"]);
    let ready: Vec<bool> = held.iter().map(|one| is_ready(one.killed())).collect();
    assert_eq!(ready, [true, false, true]);
}
