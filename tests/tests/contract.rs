//! The contract that clients hold the gate to: what it answers, in which order it checks, and what its answers carry.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

#[path = "contract/answers.rs"]
mod answers;
#[path = "contract/budgets.rs"]
mod budgets;
#[path = "contract/identity.rs"]
mod identity;
#[path = "contract/leases.rs"]
mod leases;
#[path = "contract/malformed.rs"]
mod malformed;
#[path = "contract/operations.rs"]
mod operations;
#[path = "contract/order.rs"]
mod order;
#[path = "contract/receipts.rs"]
mod receipts;
#[path = "contract/refusals.rs"]
mod refusals;
#[path = "contract/stores.rs"]
mod stores;
