use std::net::SocketAddr;

use super::*;
use crate::egress::proxy::blank_for_tests as blank;

const KILLED: u64 = 1_000;

fn client() -> SocketAddr {
    "127.0.0.1:40000".parse().unwrap()
}

fn owner() -> Owner {
    Owner { execution_id: "e".into(), action_id: "a".into(), principal: "p".into(), workspace: "w".into() }
}

fn flow(number: Option<u64>, sent: u64, received: u64) -> FlowRecord {
    FlowRecord {
        connection: number,
        bytes_from_sandbox: sent,
        bytes_to_sandbox: received,
        end: End::Closed,
        ..blank(client())
    }
}

fn kernel(number: u64, sent: u64, received: u64) -> KernelConnection {
    KernelConnection {
        number,
        client: client(),
        original: Some("198.18.0.1:443".parse().unwrap()),
        begun_ns: 1,
        ended_ns: Some(KILLED - 1),
        bytes_sent: sent,
        bytes_received: received,
        closed: true,
        established: true,
    }
}

fn joined(flows: Vec<FlowRecord>, records: Vec<KernelConnection>, lost: u64) -> (Agreement, Vec<FlowRecord>) {
    let mut flows = flows;
    let seen = KernelConnections { records, lost };
    let worst = join(&mut flows, Some(&seen), &owner(), KILLED, Moment::now());
    (worst, flows)
}

#[test]
fn figures_are_compared_for_the_same_connection_and_no_other() {
    // One port, three connections: the sums are equal and two of the connections are not.
    let flows = vec![flow(Some(0), 10, 20), flow(Some(1), 30, 40), flow(Some(2), 5, 5)];
    let (worst, flows) = joined(flows, vec![kernel(1, 10, 20), kernel(0, 30, 40), kernel(2, 5, 5)], 0);
    let agreements: Vec<_> = flows.iter().map(|flow| flow.agreement.unwrap()).collect();
    assert_eq!(agreements, [Agreement::Disagree, Agreement::Disagree, Agreement::Equal]);
    assert_eq!(worst, Agreement::Disagree);
    assert_eq!(flows[0].kernel, Some(KernelFigures { bytes_sent: 30, bytes_received: 40, closed: true }));
}

#[test]
fn what_was_open_at_the_kill_is_that_whatever_its_figures() {
    for change in [
        (|kernel| kernel.closed = false) as fn(&mut KernelConnection),
        |kernel| kernel.ended_ns = None,
        |kernel| kernel.ended_ns = Some(KILLED),
    ] {
        for sent in [10, 11] {
            let mut seen = kernel(0, 10, 0);
            change(&mut seen);
            assert_eq!(joined(vec![flow(Some(0), sent, 0)], vec![seen], 0).0, Agreement::OpenAtKill);
        }
    }
    // The client was done in time: the proxy was told to stop before it had read all.
    let cut = |sent| FlowRecord { end: End::OpenAtClose, ..flow(Some(0), sent, 0) };
    assert_eq!(joined(vec![cut(9)], vec![kernel(0, 10, 0)], 0).0, Agreement::OpenAtKill);
    assert_eq!(joined(vec![cut(10)], vec![kernel(0, 10, 0)], 0).0, Agreement::Equal);
}

#[test]
fn what_only_one_of_them_saw_is_never_equal() {
    let (worst, flows) = joined(vec![flow(Some(3), 1, 1)], Vec::new(), 0);
    assert_eq!((worst, flows[0].agreement, flows[0].kernel), (Agreement::Unknown, Some(Agreement::Unknown), None));

    let (worst, flows) = joined(Vec::new(), vec![kernel(0, 7, 0), kernel(1, 0, 0)], 0);
    assert_eq!(worst, Agreement::Disagree);
    assert_eq!((flows.len(), flows[0].agreement), (2, Some(Agreement::Disagree)));
    assert_eq!((flows[0].client, flows[0].action_id.as_deref()), (Some(client()), Some("a")));
    assert_eq!((flows[0].name.as_deref(), flows[0].port), (Some("198.18.0.1"), Some(443)));
    // Nothing was carried, and the proxy has nothing.
    assert_eq!(flows[1].agreement, Some(Agreement::Equal));
    let failed = KernelConnection { established: false, ..kernel(0, 0, 0) };
    assert_eq!(joined(Vec::new(), vec![failed], 0).1[0].error.as_deref(), Some("not_established"));
}

#[test]
fn what_was_not_counted_or_is_lost_is_unknown() {
    let refused = FlowRecord { uncounted: true, ..flow(Some(0), 0, 0) };
    assert_eq!(joined(vec![refused], vec![kernel(0, 0, 0)], 0).0, Agreement::Unknown);
    // One record of the proxy that stands for all past its limit.
    let (worst, flows) = joined(vec![flow(None, 0, 0)], vec![kernel(0, 9, 0)], 0);
    assert_eq!((worst, flows.len()), (Agreement::Unknown, 2));
    assert_eq!(joined(Vec::new(), Vec::new(), 1).0, Agreement::Unknown);
    assert_eq!(joined(Vec::new(), Vec::new(), 0).0, Agreement::Equal);
    let mut none = vec![flow(Some(0), 0, 0)];
    assert_eq!(join(&mut none, None, &owner(), KILLED, Moment::now()), Agreement::Unknown);
}

#[test]
fn a_query_to_the_resolver_is_no_connection() {
    let query = FlowRecord { protocol: Some(Protocol::Dns), decided_by: DecidedBy::Resolver, ..flow(None, 0, 0) };
    let (worst, flows) = joined(vec![query], vec![kernel(0, 0, 0)], 0);
    assert_eq!((worst, flows[0].agreement), (Agreement::Equal, None));
}

#[test]
fn the_worst_is_what_an_operator_should_look_at_first() {
    let mut all = [Agreement::Disagree, Agreement::Equal, Agreement::Unknown, Agreement::OpenAtKill];
    all.sort_unstable();
    assert_eq!(all, [Agreement::Equal, Agreement::OpenAtKill, Agreement::Unknown, Agreement::Disagree]);
}
