//! `latchgate receipts`: works on the ledger itself, so that it needs no gate.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::default_state_dir;
use super::{Failure, print};
use crate::ledger::{Anchor, PublicKeys, archive, verify};

/// The exit code for a ledger that does not verify.
const NOT_INTACT: u8 = 3;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// The newest receipts.
    #[command(after_help = "Example: latchgate receipts list --limit 5")]
    List(List),
    /// One receipt, whole.
    #[command(after_help = "Example: latchgate receipts show 0199a1b2-… --evidence")]
    Show(Show),
    /// Check a whole ledger with nothing but the public keys.
    #[command(after_help = "Example: latchgate receipts verify --ledger ./ledger --keys receipt-keys.json\n\n\
        A cut tail shows only to who knows how long the ledger was: name a record that must be there with --anchor.")]
    Verify(Verify),
    /// Write every record as a line of JSON, byte for byte as it was signed.
    #[command(after_help = "Example: latchgate receipts export > ledger.jsonl")]
    Export(Where),
}

#[derive(Debug, Args)]
pub(crate) struct Where {
    /// The ledger: its directory, its file, or (for verify) an export. That of this user's `latchgate up` by default.
    #[arg(long, value_name = "PATH")]
    ledger: Option<PathBuf>,
}

impl Where {
    fn path(&self) -> PathBuf {
        self.ledger.clone().unwrap_or_else(|| default_state_dir().join("ledger"))
    }
}

#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    place: Where,
    /// How many.
    #[arg(long, default_value_t = 20)]
    limit: u32,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    #[command(flatten)]
    place: Where,
    /// The receipt's id.
    receipt_id: String,
    /// Only what the kernel and the proxy saw.
    #[arg(long)]
    evidence: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    #[command(flatten)]
    place: Where,
    /// The public keys (a JWK set); `receipt-keys.json` beside the ledger by default. Trust only a copy of your own.
    #[arg(long, value_name = "FILE")]
    keys: Option<PathBuf>,
    /// A record that must be there: its sequence number, or SEQUENCE:HASH.
    #[arg(long, value_name = "SEQUENCE[:HASH]", value_parser = anchor)]
    anchor: Option<Anchor>,
    /// The report as JSON.
    #[arg(long)]
    json: bool,
}

fn anchor(text: &str) -> Result<Anchor, String> {
    let (sequence, hash) = match text.split_once(':') {
        Some((sequence, hash)) => (sequence, Some(hash.trim_start_matches("sha256:").to_owned())),
        None => (text, None),
    };
    let sequence = sequence.parse().map_err(|_| format!("`{sequence}` is no sequence number"))?;
    Ok(Anchor { sequence, hash })
}

pub(crate) fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::List(list) => run_list(list),
        Command::Show(show) => run_show(show),
        Command::Verify(verify) => run_verify(verify),
        Command::Export(place) => {
            verify::export(&place.path(), &mut std::io::stdout().lock()).map(|_| ()).map_err(Failure::new)
        }
    }
}

fn run_list(list: &List) -> Result<(), Failure> {
    let receipts = archive::receipts(&list.place.path(), list.limit).map_err(Failure::new)?;
    let mut text = String::new();
    if !list.json {
        text.push_str(&format!("{:<38}{:<26}{:<22}{:<18}{}\n", "RECEIPT", "FINISHED", "ACTION", "RESULT", "PRINCIPAL"));
    }
    for receipt in receipts {
        let fields = receipt.fields();
        if list.json {
            text.push_str(&format!("{}\n", Value::Object(fields.clone())));
            continue;
        }
        let field = |name: &str| fields.get(name).and_then(Value::as_str).unwrap_or("-");
        let kind = fields.get("normalized_result").and_then(|result| result.get("kind")).and_then(Value::as_str);
        text.push_str(&format!(
            "{:<38}{:<26}{:<22}{:<18}{}\n",
            receipt.receipt_id(),
            field("finished_at"),
            receipt.action_id(),
            kind.unwrap_or("-"),
            receipt.principal()
        ));
    }
    print(&text)
}

fn run_show(show: &Show) -> Result<(), Failure> {
    let found = archive::receipt(&show.place.path(), &show.receipt_id).map_err(Failure::new)?;
    let receipt = found.ok_or_else(|| Failure::new(format!("no receipt {}", show.receipt_id)))?;
    let value = if show.evidence {
        receipt.fields().get("egress_evidence").cloned().unwrap_or(Value::Null)
    } else {
        Value::Object(receipt.fields().clone())
    };
    print(&format!("{value:#}\n"))
}

fn run_verify(arguments: &Verify) -> Result<(), Failure> {
    let ledger = arguments.place.path();
    let beside = if ledger.is_dir() { ledger.clone() } else { ledger.parent().map(PathBuf::from).unwrap_or_default() };
    let keys = arguments.keys.clone().unwrap_or_else(|| beside.join("receipt-keys.json"));
    let keys = PublicKeys::read(&keys).map_err(Failure::new)?;
    let report = verify::verify(&ledger, &keys, arguments.anchor.as_ref()).map_err(Failure::new)?;
    if arguments.json {
        print(&format!("{}\n", json!(report)))?;
    } else {
        let mut text = String::new();
        let mut line = |name: &str, value: &dyn std::fmt::Display| text.push_str(&format!("{name:<16}{value}\n"));
        line("intact", &report.intact);
        line("records", &report.total_events);
        line("links verified", &report.verified_links);
        line("receipts", &report.receipts);
        for (word, receipts) in &report.agreement {
            // What the signatures hold says of itself: no fault of the ledger.
            line(&format!("  {}", word.replace('_', " ")), &format!("{receipts} (kernel and proxy)"));
        }
        line("intents", &report.intents);
        line("open intents", &report.open_intents);
        line("end of the log", &json!(report.tail).as_str().unwrap_or_default());
        for problem in &report.problems {
            line(&format!("at {}", problem.sequence), &problem.what);
        }
        print(&text)?;
    }
    if report.intact {
        Ok(())
    } else {
        Err(Failure::with_code(format!("{} is not intact", ledger.display()), NOT_INTACT))
    }
}
