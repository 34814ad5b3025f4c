//! The addresses that stand for names.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::egress::profile::Name;

/// 198.18.0.0/15 is for benchmarks of devices and never routed (RFC 2544 §C.2.2), so it can stand for anything.
const BASE: u32 = u32::from_be_bytes([198, 18, 0, 0]);
/// How many addresses 198.18.0.0/15 has between its first and its last.
const ROOM: usize = (1 << 17) - 2;

/// What the stand-ins of one execution stand for. Another execution has a table, and meanings, of its own.
#[derive(Debug)]
pub struct NameTable {
    limit: usize,
    names: Mutex<Names>,
}

#[derive(Debug, Default)]
struct Names {
    /// Name number `i` has the address 198.18.0.0 + 1 + `i`.
    by_number: Vec<Name>,
    numbers: HashMap<Name, usize>,
}

/// The execution has as many names as it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("as many names as an execution may have")]
pub struct Full;

/// Why a name has no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unnamed<E> {
    Full,
    /// The address could not be made ready.
    NotReady(E),
}

impl NameTable {
    /// A table for at most `limit` names.
    pub fn new(limit: usize) -> Self {
        Self { limit: limit.min(ROOM), names: Mutex::default() }
    }

    /// The address that stands for `name`, from now until the execution ends.
    ///
    /// # Errors
    /// [`Full`].
    pub fn stand_in(&self, name: &Name) -> Result<Ipv4Addr, Full> {
        self.stand_in_once(name, |_| Ok::<(), Full>(())).map_err(|_| Full)
    }

    /// As [`NameTable::stand_in`]; `ready` is called with an address that is new before anybody can learn of it, and
    /// when it fails the name has none.
    ///
    /// # Errors
    /// [`Unnamed`].
    pub fn stand_in_once<E>(
        &self,
        name: &Name,
        ready: impl FnOnce(Ipv4Addr) -> Result<(), E>,
    ) -> Result<Ipv4Addr, Unnamed<E>> {
        let mut names = self.names();
        if let Some(&number) = names.numbers.get(name) {
            return Ok(address(number));
        }
        let number = names.by_number.len();
        if number >= self.limit {
            return Err(Unnamed::Full);
        }
        ready(address(number)).map_err(Unnamed::NotReady)?;
        names.by_number.push(name.clone());
        names.numbers.insert(name.clone(), number);
        Ok(address(number))
    }

    /// The name that `address` stands for; `None` when this execution was never given that address.
    pub fn name_of(&self, address: Ipv4Addr) -> Option<Name> {
        let number = u32::from(address).checked_sub(BASE + 1)?;
        self.names().by_number.get(usize::try_from(number).ok()?).cloned()
    }

    /// How many names have an address.
    pub fn len(&self) -> usize {
        self.names().by_number.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn address(number: usize) -> Ipv4Addr {
    // `number` is below ROOM.
    Ipv4Addr::from(BASE + 1 + number as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Name {
        Name::parse(text).unwrap()
    }

    #[test]
    fn a_name_keeps_its_address_and_an_address_its_name() {
        let table = NameTable::new(1024);
        let first = table.stand_in(&name("a.example")).unwrap();
        let second = table.stand_in(&name("b.example")).unwrap();
        assert_eq!((first, second), (Ipv4Addr::new(198, 18, 0, 1), Ipv4Addr::new(198, 18, 0, 2)));
        assert_eq!(table.stand_in(&name("a.example")), Ok(first));
        assert_eq!(table.name_of(first), Some(name("a.example")));
        for unknown in ["198.18.0.0", "198.18.0.3", "198.17.255.255", "0.0.0.0", "255.255.255.255", "127.0.0.1"] {
            assert_eq!(table.name_of(unknown.parse().unwrap()), None, "{unknown}");
        }
    }

    #[test]
    fn names_are_bounded_and_stay_in_the_range() {
        let table = NameTable::new(usize::MAX);
        let mut last = None;
        for number in 0..ROOM {
            last = Some(table.stand_in(&name(&format!("n{number}.example"))).unwrap());
        }
        assert_eq!(last, Some(Ipv4Addr::new(198, 19, 255, 254)));
        assert_eq!(table.stand_in(&name("more.example")), Err(Full));
        // Those that are there still are.
        assert_eq!(table.stand_in(&name("n0.example")), Ok(Ipv4Addr::new(198, 18, 0, 1)));
        let small = NameTable::new(1);
        small.stand_in(&name("a.example")).unwrap();
        assert_eq!(small.stand_in(&name("b.example")), Err(Full));
    }

    #[test]
    fn an_address_that_is_not_ready_is_not_given() {
        let table = NameTable::new(8);
        assert_eq!(table.stand_in_once(&name("a.example"), |_| Err("no")), Err(Unnamed::NotReady("no")));
        assert!(table.is_empty());
        assert_eq!(table.name_of(Ipv4Addr::new(198, 18, 0, 1)), None);
        let mut calls = 0;
        for _ in 0..3 {
            table
                .stand_in_once(&name("a.example"), |_| {
                    calls += 1;
                    Ok::<(), ()>(())
                })
                .unwrap();
        }
        assert_eq!(calls, 1);
    }
}
