//! Programs that know nothing of proxies: carried where the profile names the host, refused at once where it does not,
//! in a network namespace of their own and in the gate's.

#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used)]

#[path = "carried/clients.rs"]
mod clients;
#[path = "carried/crowd.rs"]
mod crowd;
#[path = "carried/entries.rs"]
mod entries;
#[path = "carried/fronting.rs"]
mod fronting;
#[path = "carried/git.rs"]
mod git;
#[path = "carried/http.rs"]
mod http;
#[path = "carried/life.rs"]
mod life;
#[path = "carried/names.rs"]
mod names;
#[path = "carried/postgres.rs"]
mod postgres;
#[path = "carried/walls.rs"]
mod walls;
#[path = "carried/world.rs"]
mod world;
