//! A technique, what it should come to, and how that is shown: outside it reaches its target, in an action it does not,
//! and in an action without the guards that it is up against, it does again.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use latchgate_tests::agent::Agent;
use latchgate_tests::gate::{Gate, Setup};
use latchgate_tests::inside::{outside, python, receipt, with_code};
use serde_json::{Value, json};

use crate::world::{PORTS, Target, token};

const PRELUDE: &str = include_str!("../../escape/prelude.py");

/// Who refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// This hook of the kernel program, for this reason. The kernel counts it, and the receipt has the refusal.
    Hook(&'static str, &'static str),
    /// The filter of system calls; nobody hears of it.
    Seccomp,
    /// That the thing has no name where the action is; nobody hears of it.
    Namespace,
    /// The resolver or the proxy, by this rule, which the receipt has.
    Rule(&'static str, &'static str),
    /// A rule of Landlock or a limit of the kernel's; nobody hears of it.
    Kernel,
}

/// What shows that it got out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// The target was sent the token.
    ByTheTarget,
    /// What it says: there is nothing that could be reached.
    ByItself,
}

#[derive(Clone, Copy, Debug)]
pub struct Technique {
    pub name: &'static str,
    pub code: &'static str,
    /// More parameters than the target's, as JSON.
    pub with: &'static str,
    /// `nothing`: the profile is none. `names`: it has names, at the target.
    pub action: &'static str,
    /// What the attacker is told in the action.
    pub said: &'static str,
    pub by: By,
    pub shown: Shown,
    /// Without all of these it gets out. Each of them alone keeps it in, but for those of `needs`.
    pub guards: &'static [&'static str],
    /// Those of `guards` that stop nothing without the others: they are taken away so that the rest can be seen.
    pub needs: &'static [&'static str],
}

/// Allowed as TCP, over TLS, as HTTP, allowed with an address that is not, and not allowed. With the guard of names off
/// the proxy takes the profile's last entry, which is the first of these.
pub const NAMES: [&str; 5] =
    ["yes.escape.test", "tls.escape.test", "web.escape.test", "inner.escape.test", "no.escape.test"];

/// A gate with both actions, and an agent of it.
pub fn gate(target: &Target, network: &str, guards_off: &[&str]) -> (Gate, Agent) {
    let gate = setup(target, network).unguarded(guards_off).start();
    let agent = Agent::connect(&gate.agent());
    (gate, agent)
}

/// Both actions.
pub fn setup(target: &Target, network: &str) -> Setup {
    let [tcp, tls, web, inner, outside] = NAMES;
    let [p0, p1, p2, _] = PORTS;
    let entries = format!(
        "{{domain: {tcp}, ports: [{p0}], protocol: tcp, exact: true}}, {{domain: {inner}, ports: [{p0}], protocol: tcp, exact: true}}, \
         {{domain: {tls}, ports: [{p1}], exact: true}}, {{domain: {web}, ports: [{p2}], protocol: http, exact: true}}"
    );
    let (v4, other) = (&target.v4, &target.other_v4);
    Setup::new("escape")
        .roomy_command("nothing", &python(), "{profile: none}", 4096)
        .roomy_command("names", &python(), &format!("{{profile: proxy_allowlist, allowed_domains: [{entries}]}}"), 4096)
        .config(&format!(
            "[sandbox]\nnetwork = \"{network}\"\nmax_processes = 24\nscratch_bytes = 4194304\n\n\
             [egress]\nallow_addresses = [\"{v4}/32\"]\n\n\
             [egress.hosts]\n\"{tcp}\" = [\"{v4}\"]\n\"{tls}\" = [\"{v4}\"]\n\"{web}\" = [\"{v4}\"]\n\"{inner}\" = [\"{other}\"]\n\
             \"{outside}\" = [\"{v4}\"]\n"
        ))
}

/// One attempt: what the attacker was told, whether it got out, and the receipt's evidence.
struct Attempt {
    said: String,
    out: bool,
    evidence: Vec<Value>,
    token: String,
}

impl Technique {
    fn code(&self) -> String {
        format!("{PRELUDE}\n{}\nreport(attempt)", self.code)
    }

    fn params(&self, target: &Target, token: &str, more: &Value) -> Value {
        let mut params = target.params(token);
        for source in [more, &serde_json::from_str(self.with).unwrap()] {
            for (key, value) in source.as_object().unwrap() {
                params[key] = value.clone();
            }
        }
        params
    }

    fn got_out(&self, target: &Target, said: &str, token: &str, patience: Duration) -> bool {
        match self.shown {
            Shown::ByTheTarget => target.heard(token, patience),
            Shown::ByItself => said == "ok",
        }
    }

    fn outside(&self, target: &Target, more: &Value) -> Attempt {
        let token = token();
        let said = outside(&self.code(), &self.params(target, &token, more));
        let said = said.as_str().unwrap().to_owned();
        let out = self.got_out(target, &said, &token, SETTLE);
        Attempt { said, out, evidence: Vec::new(), token }
    }

    fn inside(&self, target: &Target, agent: &Agent, more: &Value, patience: Duration) -> Attempt {
        let token = token();
        let mut params = self.params(target, &token, more);
        params["patience"] = json!(patience.as_secs_f32());
        let answer = agent.execute(self.action, &with_code(&self.code(), &params)).json();
        // One that cannot even be ended by itself (a connect that io_uring waits for) is ended by its time.
        let said = answer["output"].as_str().or(answer["reason"].as_str()).unwrap_or_else(|| panic!("{answer}"));
        let out = self.got_out(target, said, &token, SETTLE);
        let evidence = receipt(agent, &answer)["egress_evidence"].as_array().unwrap().clone();
        Attempt { said: said.to_owned(), out, evidence, token }
    }

    /// Sees it reach its target from outside; `false` where this kernel does not have it at all, and can only refuse.
    fn control(&self, target: &Target, more: &Value) -> bool {
        let control = self.outside(target, more);
        if matches!(control.said.as_str(), "EPROTONOSUPPORT" | "EAFNOSUPPORT" | "ESOCKTNOSUPPORT") {
            eprintln!("{}: not in this kernel ({})", self.name, control.said);
            return false;
        }
        assert!(control.out, "{}: inconclusive, outside it came to {}", self.name, control.said);
        true
    }

    /// Tries it in an action: the token that was sent, or what is not as it should be.
    fn tried(
        &self,
        target: &Target,
        agent: &Agent,
        more: &Value,
        expect: Expect,
        name: &str,
    ) -> Result<String, String> {
        let patience = if expect == Expect::Out { PATIENCE } else { IMPATIENCE };
        let attempt = self.inside(target, agent, more, patience);
        let line = format!("{name}: {}, {}", attempt.said, if attempt.out { "out" } else { "in" });
        eprintln!("{line}");
        if attempt.out != (expect == Expect::Out) {
            return Err(line);
        }
        if expect == Expect::AsWritten {
            if attempt.said != self.said {
                return Err(format!("{line}: said {}: {:#?}", attempt.said, attempt.evidence));
            }
            self.record(&attempt).map_err(|why| format!("{line}: {why}"))?;
        }
        Ok(attempt.token)
    }

    /// Whether the receipt says of the refusal what it should, or nothing.
    fn record(&self, attempt: &Attempt) -> Result<(), String> {
        let (totals, flows) = attempt.evidence.split_first().unwrap();
        let denied = totals["kernel"]["denied"].as_object().unwrap();
        let refused = |by: &str, rule: &str| {
            flows.iter().any(|flow| flow["verdict"] == "deny" && flow["decided_by"] == by && flow["rule"] == rule)
        };
        let recorded = match self.by {
            By::Hook(hook, reason) => denied[hook].as_u64() >= Some(1) && refused("hook", reason),
            By::Rule(by, rule) => refused(by, rule),
            By::Seccomp | By::Namespace | By::Kernel => denied.values().all(|count| count == 0),
        };
        if recorded {
            Ok(())
        } else {
            Err(format!("{:?} is not what the receipt says: {:#?}", self.by, attempt.evidence))
        }
    }
}

/// How long a token is waited for, once the attacker has ended.
const SETTLE: Duration = Duration::from_millis(300);
/// The attacker's own patience: where it must get out, and where it must not.
const PATIENCE: Duration = Duration::from_secs(4);
const IMPATIENCE: Duration = Duration::from_millis(700);
/// Gates at one time: attackers mostly wait.
const AT_ONCE: usize = 4;

/// What is tried of a technique.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expect {
    /// All guards are there: what it comes to and who refuses are the row's.
    AsWritten,
    /// It stays in.
    In,
    Out,
}

/// One gate, and what is tried of each technique in it.
struct Round<'a> {
    network: &'static str,
    off: Vec<&'static str>,
    tries: Vec<(&'a Technique, Expect)>,
}

/// Walks the table.
pub fn walk(target: &Target, techniques: &[Technique], more: &Value) {
    let rounds = Mutex::new(rounds(target, techniques, more));
    let (wrong, must_not) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    let work = || {
        loop {
            let Some(round) = rounds.lock().unwrap().pop() else { return };
            let (_gate, agent) = gate(target, round.network, &round.off);
            for (technique, expect) in round.tries {
                let name = format!("{} ({}, without {:?})", technique.name, round.network, round.off);
                match technique.tried(target, &agent, more, expect, &name) {
                    Ok(token) if expect != Expect::Out => must_not.lock().unwrap().push((name, token)),
                    Ok(_) => {}
                    Err(line) => wrong.lock().unwrap().push(line),
                }
            }
        }
    };
    std::thread::scope(|scope| (0..AT_ONCE).for_each(|_| drop(scope.spawn(work))));
    concluded(target, &wrong.into_inner().unwrap(), must_not.into_inner().unwrap());
}

/// Walks the table in one gate that has all its guards, where each row must be refused as it is written.
pub fn stays_in(target: &Target, agent: &Agent, techniques: &[Technique], more: &Value, network: &str) {
    let (mut wrong, mut must_not) = (Vec::new(), Vec::new());
    // In a namespace of its own it may fail by that first.
    let expect = if network == "shared" { Expect::AsWritten } else { Expect::In };
    for technique in techniques {
        technique.control(target, more);
        let name = format!("{} ({network})", technique.name);
        match technique.tried(target, agent, more, expect, &name) {
            Ok(token) => must_not.push((name, token)),
            Err(line) => wrong.push(line),
        }
    }
    concluded(target, &wrong, must_not);
}

fn concluded(target: &Target, wrong: &[String], must_not: Vec<(String, String)>) {
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for (name, token) in must_not {
        assert!(!target.heard(&token, Duration::ZERO), "{name}: it came late");
    }
}

/// All that is to be tried, by the guards that are off, so that each such gate is started once. The control comes first.
fn rounds<'a>(target: &Target, techniques: &'a [Technique], more: &Value) -> Vec<Round<'a>> {
    let as_written = |network, expect| Round {
        network,
        off: Vec::new(),
        tries: techniques.iter().map(|technique| (technique, expect)).collect(),
    };
    // In a namespace of its own it may fail by that first.
    let mut rounds = vec![as_written("isolated", Expect::In), as_written("shared", Expect::AsWritten)];
    let mut off: BTreeMap<Vec<&'static str>, Vec<(&Technique, Expect)>> = BTreeMap::new();
    for technique in techniques {
        if technique.control(target, more) {
            off.entry(technique.guards.to_vec()).or_default().push((technique, Expect::Out));
        }
        for kept in technique.guards.iter().filter(|guard| !technique.needs.contains(guard)) {
            let others: Vec<_> = technique.guards.iter().copied().filter(|guard| guard != kept).collect();
            if !others.is_empty() {
                off.entry(others).or_default().push((technique, Expect::In));
            }
        }
    }
    rounds.extend(off.into_iter().map(|(off, tries)| Round { network: "shared", off, tries }));
    rounds
}

/// Nothing beside the target.
pub fn nothing_more() -> Value {
    json!({})
}
