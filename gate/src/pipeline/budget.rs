//! The two kinds of budget of a call: the operator's windows for its principal, and what its lease set itself.

use std::sync::Arc;

use serde_json::Value;

use crate::auth::lease::LeaseClaims;
use crate::config::{Budget, BudgetWindow};
use crate::pipeline::authenticate::Caller;
use crate::pipeline::grant::GrantError;
use crate::store::{
    BudgetStore, DebitOutcome, DebitRequest, LeaseBudget, Period, Remaining, StoreError, Ticket, Window,
};
use crate::time::Timestamp;

/// Budgets as configured, over the store that counts them.
pub struct Budgets {
    store: Arc<dyn BudgetStore>,
    configured: Vec<Budget>,
}

/// One call's debit; [`Budgets::refund`] gives it back.
#[derive(Debug)]
pub struct Debit {
    ticket: Ticket,
    remaining: Remaining,
}

impl Debit {
    /// What is left, as a result shows it; `None` when nothing limits the caller.
    pub fn remaining_view(&self) -> Option<Value> {
        serde_json::to_value(self.remaining)
            .ok()
            .filter(|view| view.as_object().is_some_and(|fields| !fields.is_empty()))
    }
}

impl Budgets {
    pub fn new(store: Arc<dyn BudgetStore>, configured: Vec<Budget>) -> Self {
        Self { store, configured }
    }

    pub fn remaining(&self, caller: &Caller, now: Timestamp) -> Result<Remaining, StoreError> {
        self.store.remaining(&self.request(caller, 0, now))
    }

    pub fn debit(&self, caller: &Caller, cost_usd_cents: u64, now: Timestamp) -> Result<Debit, GrantError> {
        match self.store.debit(&self.request(caller, cost_usd_cents, now)) {
            Ok(DebitOutcome::Debited { ticket, remaining }) => Ok(Debit { ticket, remaining }),
            Ok(DebitOutcome::Exhausted { which }) => Err(GrantError::BudgetExhausted { which }),
            Err(error) => Err(GrantError::BudgetStore { message: error.to_string() }),
        }
    }

    /// Gives back what was debited for something that was never dispatched. A refund that fails leaves the caller with
    /// less, never with more.
    pub fn refund(&self, debit: &Debit) {
        if let Err(error) = self.store.refund(&debit.ticket) {
            tracing::error!(%error, "a debit could not be given back");
        }
    }

    fn request(&self, caller: &Caller, cost_usd_cents: u64, now: Timestamp) -> DebitRequest {
        let lease = &caller.proven().lease;
        DebitRequest {
            principal: lease.principal.clone(),
            operator: windows(&self.configured, &lease.principal),
            lease: lease_budget(lease),
            cost_usd_cents,
            now,
        }
    }
}

/// The windows that hold for `principal`: its own and those of everyone.
fn windows(configured: &[Budget], principal: &str) -> Vec<Window> {
    configured
        .iter()
        .enumerate()
        .filter(|(_, budget)| budget.principal == "*" || budget.principal == principal)
        .map(|(index, budget)| {
            let (period, word) = match budget.window {
                BudgetWindow::Hour => (Period::Hour, "hour"),
                BudgetWindow::Day => (Period::Day, "day"),
                BudgetWindow::Month => (Period::Month, "month"),
            };
            Window {
                name: format!("{word}-{index}"),
                period,
                max_calls: budget.max_calls,
                max_cost_usd_cents: budget.max_cost_usd_cents,
            }
        })
        .collect()
}

fn lease_budget(lease: &LeaseClaims) -> Option<LeaseBudget> {
    let budgets = lease.budgets.as_ref()?;
    Some(LeaseBudget {
        lease_jti: lease.lease_jti.clone(),
        max_calls: budgets.max_calls,
        max_cost_usd_cents: budgets.max_cost_usd_cents,
        expires: lease.expires_at(),
    })
}
