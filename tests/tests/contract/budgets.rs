//! The client's own budget is gone with its lease; the operator's is refilled by nothing that a client sends.

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::Setup;
use latchgate_tests::http::Target;
use serde_json::{Value, json};

use crate::answers::{echo, passed, refused, refused_with, with_echo};

fn call(agent: &Agent, action: &str) -> Value {
    passed(&agent.execute(action, &json!({})))["budget"].clone()
}

fn priced(name: &str) -> Setup {
    with_echo(name)
        .manifest("priced", &echo("priced", "low", "cost_usd_cents: 40"))
        .manifest("medium", &echo("medium", "medium", ""))
}

#[test]
fn a_lease_limits_itself_and_no_other() {
    let gate = priced("own").start();
    let limited =
        |budgets: Value| Agent::connect_with(&gate.agent(), json!({"scopes": ["tools:call"], "budgets": budgets}));

    let agent = limited(json!({"max_calls": 2}));
    assert_eq!(call(&agent, "echo"), json!({"calls_remaining": 1}));
    // What was refused cost nothing.
    refused(&agent.execute("echo", &json!({"text": 1})), "422 schema_violation");
    refused(&agent.execute("medium", &json!({})), "403 policy_denied");
    assert_eq!(call(&agent, "echo"), json!({"calls_remaining": 0}));
    refused_with(&agent.execute("echo", &json!({})), "403 budget_exhausted", &["deny_reason"]);
    // At zero, before policy is asked: the code does not say whether policy would have allowed it.
    refused(&agent.execute("medium", &json!({})), "403 budget_exhausted");
    // A receipt costs nothing, and another lease has a budget of its own.
    refused(&agent.receipt("none"), "404 not_found");
    assert_eq!(call(&limited(json!({"max_calls": 2})), "echo"), json!({"calls_remaining": 1}));
    assert_eq!(call(&Agent::connect(&gate.agent()), "echo"), Value::Null, "nothing limits it");

    let agent = limited(json!({"max_cost_usd_cents": 100}));
    assert_eq!(call(&agent, "priced"), json!({"cost_remaining_usd_cents": 60}));
    assert_eq!(call(&agent, "priced"), json!({"cost_remaining_usd_cents": 20}));
    refused(&agent.execute("priced", &json!({})), "403 budget_exhausted");
    assert_eq!(call(&agent, "echo"), json!({"cost_remaining_usd_cents": 20}), "what costs nothing still fits");

    let agent = limited(json!({"max_calls": 5, "max_cost_usd_cents": 80}));
    assert_eq!(call(&agent, "priced"), json!({"calls_remaining": 4, "cost_remaining_usd_cents": 40}));
    assert_eq!(call(&agent, "priced"), json!({"calls_remaining": 3, "cost_remaining_usd_cents": 0}));
    refused(&agent.execute("echo", &json!({})), "403 budget_exhausted");
}

#[test]
fn a_new_lease_does_not_refill_the_operators_budget() {
    let mut gate = priced("operator-budget")
        .config("[[listeners]]\nname = \"second\"\npath = \"{dir}/second/gate.sock\"\nprincipal = \"other\"")
        .config("[[budgets]]\nprincipal = \"*\"\nwindow = \"month\"\nmax_calls = 3\n\n[[budgets]]\nprincipal = \"tester\"\nwindow = \"month\"\nmax_cost_usd_cents = 1000\n")
        .start();
    let first = Agent::connect(&gate.agent());
    assert_eq!(call(&first, "priced"), json!({"calls_remaining": 2, "cost_remaining_usd_cents": 960}));
    // A renewal, with a fresh key, as the published client does it; then one that asks for more than there is.
    let renewed = Agent::connect(&gate.agent());
    assert_eq!(call(&renewed, "echo"), json!({"calls_remaining": 1, "cost_remaining_usd_cents": 960}));
    let greedy = Agent::connect_with(&gate.agent(), json!({"scopes": ["tools:call"], "budgets": {"max_calls": 1000}}));
    assert_eq!(call(&greedy, "echo")["calls_remaining"], 0, "the tighter of the two");
    for agent in [&first, &renewed, &greedy, &Agent::connect(&gate.agent())] {
        refused(&agent.execute("echo", &json!({})), "403 budget_exhausted");
    }
    // Each principal by itself.
    let other = Target::Unix(gate.directory().join("second/gate.sock"));
    assert_eq!(call(&Agent::connect(&other), "echo"), json!({"calls_remaining": 2}));
    // What was spent is known after the gate was killed.
    gate.kill();
    gate.start();
    refused(&Agent::connect(&gate.agent()).execute("echo", &json!({})), "403 budget_exhausted");
    assert_eq!(call(&Agent::connect(&other), "echo"), json!({"calls_remaining": 1}));
}

#[test]
fn calls_at_the_same_time_do_not_overdraw() {
    const CALLS: usize = 8;
    let gate = priced("race").config("[[budgets]]\nprincipal = \"*\"\nwindow = \"month\"\nmax_calls = 3\n").start();
    let agents: Vec<Agent> = (0..CALLS).map(|_| Agent::connect(&gate.agent())).collect();
    let barrier = std::sync::Barrier::new(CALLS);
    let codes: Vec<String> = std::thread::scope(|scope| {
        let calls: Vec<_> = agents
            .iter()
            .map(|agent| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    let response = agent.execute("echo", &json!({}));
                    if response.status == 200 { "200".to_owned() } else { response.code() }
                })
            })
            .collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    assert_eq!(codes.iter().filter(|code| *code == "200").count(), 3, "{codes:?}");
    assert_eq!(codes.iter().filter(|code| *code == "403 budget_exhausted").count(), CALLS - 3, "{codes:?}");
}
