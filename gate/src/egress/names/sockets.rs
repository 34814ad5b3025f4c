//! The sockets of the resolver: eight ports in a row for each family, the slots that the kernel program sends queries to.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};

/// How many servers one socket of a client can ask at one time.
pub const SLOTS: u16 = 8;
/// Ranges that are tried before it is given up.
const TRIES: usize = 64;

/// The bound sockets of one network namespace.
#[derive(Debug)]
pub struct Slots {
    v4: Vec<UdpSocket>,
    v6: Vec<UdpSocket>,
}

impl Slots {
    /// Binds [`SLOTS`] ports in a row on 127.0.0.1, and as many on ::1 where there is one. Without SO_REUSEADDR, which
    /// would let another process bind the same port more specifically and be asked instead.
    ///
    /// # Errors
    /// When there are no such ports.
    pub fn bind() -> io::Result<Self> {
        let mut outcome = io::Error::from(io::ErrorKind::AddrInUse);
        for _ in 0..TRIES {
            let v4 = in_a_row(Ipv4Addr::LOCALHOST.into(), 0)?;
            let base = v4.first().ok_or(io::ErrorKind::NotFound)?.local_addr()?.port();
            // The same ports in both families: a namespace of an execution's own has one base for its sockets.
            match in_a_row(Ipv6Addr::LOCALHOST.into(), base) {
                Ok(v6) => return Ok(Self { v4, v6 }),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => outcome = error,
                // No IPv6 on this machine.
                Err(_) => return Ok(Self { v4, v6: Vec::new() }),
            }
        }
        Err(outcome)
    }

    /// The first slot of IPv4.
    ///
    /// # Errors
    /// When the kernel does not say what was bound.
    pub fn v4_base(&self) -> io::Result<SocketAddrV4> {
        match self.v4.first().ok_or(io::ErrorKind::NotFound)?.local_addr()? {
            SocketAddr::V4(address) => Ok(address),
            SocketAddr::V6(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// The first slot of IPv6; `None` on a machine without it.
    ///
    /// # Errors
    /// As [`Slots::v4_base`].
    pub fn v6_base(&self) -> io::Result<Option<SocketAddrV6>> {
        match self.v6.first().map(UdpSocket::local_addr).transpose()? {
            Some(SocketAddr::V6(address)) => Ok(Some(address)),
            Some(SocketAddr::V4(_)) => Err(io::ErrorKind::InvalidData.into()),
            None => Ok(None),
        }
    }

    pub fn into_sockets(self) -> Vec<UdpSocket> {
        self.v4.into_iter().chain(self.v6).collect()
    }
}

/// From `base` on; anywhere when it is 0.
fn in_a_row(address: IpAddr, base: u16) -> io::Result<Vec<UdpSocket>> {
    let mut outcome = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..if base == 0 { TRIES } else { 1 } {
        let first = UdpSocket::bind((address, base))?;
        let base = first.local_addr()?.port();
        let Some(last) = base.checked_add(SLOTS - 1) else { continue };
        let others = (base + 1..=last).map(|port| UdpSocket::bind((address, port))).collect::<io::Result<Vec<_>>>();
        match others {
            Ok(others) => return Ok(std::iter::once(first).chain(others).collect()),
            Err(error) => outcome = error,
        }
    }
    Err(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_in_a_row_and_nobody_elses() {
        let slots = Slots::bind().unwrap();
        let (v4, v6) = (slots.v4_base().unwrap(), slots.v6_base().unwrap());
        let taken = |address: IpAddr, base: u16| {
            for port in base..base + SLOTS {
                assert_eq!(UdpSocket::bind((address, port)).unwrap_err().kind(), io::ErrorKind::AddrInUse);
            }
        };
        taken(Ipv4Addr::LOCALHOST.into(), v4.port());
        // The wildcard is no way in either.
        taken(Ipv4Addr::UNSPECIFIED.into(), v4.port());
        if let Some(v6) = v6 {
            assert_eq!(v6.port(), v4.port());
            taken(Ipv6Addr::LOCALHOST.into(), v6.port());
        }
        let sockets = slots.into_sockets();
        assert_eq!(sockets.len(), usize::from(SLOTS) * if v6.is_some() { 2 } else { 1 });
    }
}
