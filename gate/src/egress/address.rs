//! Hosts as clients write them, and the addresses that the proxy never dials.
//!
//! A host is parsed once, by the URL Standard's host parser, and what was parsed is what every later step uses: the
//! profile, the resolver, the dial and the TLS name. So `0x7f.1`, `2130706433`, `[::ffff:127.0.0.1]` and `127.0.0.1.`
//! are one address here, as they are to the client libraries that would dial them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use crate::guards::{self, Guard};

/// A host that a client named: a DNS name in lower-case ASCII without a trailing dot, or an address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    Name(String),
    /// Never an IPv4-mapped IPv6 address: that is the IPv4 address.
    Address(IpAddr),
}

/// Why a text is no host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    #[error("the host is empty or not a valid DNS name or address")]
    Invalid,
    #[error("an IPv6 address must stand in brackets and carry no zone")]
    Brackets,
    #[error("the port must be a number from 1 to 65535")]
    Port,
}

impl Host {
    /// Parses the host of an authority (IPv6 in brackets) as the URL Standard does for `http` and `https`, and then
    /// holds names to what DNS can carry (RFC 1035 §2.3.4, with the underscore that real names have).
    ///
    /// # Errors
    /// [`HostError`] for anything that is neither.
    pub fn parse(text: &str) -> Result<Self, HostError> {
        if text.contains(':') && !(text.starts_with('[') && text.ends_with(']')) {
            return Err(HostError::Brackets);
        }
        match url::Host::parse(text) {
            Ok(host) => Self::from_url(host),
            Err(_) if text.starts_with('[') => Err(HostError::Brackets),
            Err(_) => Err(HostError::Invalid),
        }
    }

    /// The same for a host that [`url::Url`] parsed.
    ///
    /// # Errors
    /// [`HostError::Invalid`] for a name that DNS cannot carry.
    pub fn from_url<S: AsRef<str>>(host: url::Host<S>) -> Result<Self, HostError> {
        match host {
            url::Host::Ipv4(address) => Ok(Self::Address(address.into())),
            url::Host::Ipv6(address) => Ok(Self::Address(IpAddr::V6(address).to_canonical())),
            url::Host::Domain(name) => {
                let name = name.as_ref();
                let name = name.strip_suffix('.').unwrap_or(name);
                let label = |label: &str| {
                    (1..=63).contains(&label.len())
                        && label.bytes().all(|c| matches!(c, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
                };
                if name.len() > 253 || !name.split('.').all(label) {
                    return Err(HostError::Invalid);
                }
                Ok(Self::Name(name.to_owned()))
            }
        }
    }

    /// Parses `host:port` as CONNECT has it (RFC 9110 §9.3.6): the port is not optional.
    ///
    /// # Errors
    /// [`HostError`] when either part is missing or wrong.
    pub fn parse_authority(text: &str) -> Result<(Self, u16), HostError> {
        let (host, port) = text.rsplit_once(':').ok_or(HostError::Port)?;
        if host.contains(':') && !host.ends_with(']') {
            return Err(HostError::Brackets);
        }
        Ok((Self::parse(host)?, parse_port(port)?))
    }

    /// The host as an authority has it, IPv6 in brackets.
    pub fn to_authority(&self) -> String {
        match self {
            Self::Address(IpAddr::V6(address)) => format!("[{address}]"),
            other => other.to_string(),
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// A port of an authority: digits alone, not zero.
///
/// # Errors
/// [`HostError::Port`] for anything else.
pub fn parse_port(text: &str) -> Result<u16, HostError> {
    if text.is_empty() || !text.bytes().all(|c| c.is_ascii_digit()) {
        return Err(HostError::Port);
    }
    text.parse().ok().filter(|&port| port != 0).ok_or(HostError::Port)
}

/// An address that the proxy does not dial, and the class that says why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the address is not public ({class})")]
pub struct Refused {
    /// A word of the table below: `private`, `loopback`, `link_local`, …
    pub class: &'static str,
}

/// Whether an address is of the public Internet, by EGRESS's table (from the IANA special-purpose registries, RFC 6890
/// and its successors, and the metadata addresses of clouds). Forms that carry an IPv4 address are judged as that.
///
/// # Errors
/// [`Refused`] names the class of an address that is not.
pub fn classify(address: IpAddr) -> Result<(), Refused> {
    match address {
        IpAddr::V4(address) => classify_v4(address),
        IpAddr::V6(address) => classify_v6(address),
    }
}

const fn v4(a: u8, b: u8, c: u8, d: u8) -> u32 {
    u32::from_be_bytes([a, b, c, d])
}

const V4: &[(u32, u32, &str)] = &[
    (v4(255, 255, 255, 255), 32, "broadcast"),
    (v4(168, 63, 129, 16), 32, "cloud_platform"),
    (v4(0, 0, 0, 0), 8, "this_network"),
    (v4(10, 0, 0, 0), 8, "private"),
    (v4(100, 64, 0, 0), 10, "shared"),
    (v4(127, 0, 0, 0), 8, "loopback"),
    (v4(169, 254, 0, 0), 16, "link_local"),
    (v4(172, 16, 0, 0), 12, "private"),
    (v4(192, 0, 0, 0), 24, "protocol_assignment"),
    (v4(192, 0, 2, 0), 24, "documentation"),
    (v4(192, 88, 99, 0), 24, "relay_anycast"),
    (v4(192, 168, 0, 0), 16, "private"),
    (v4(198, 18, 0, 0), 15, "benchmarking"),
    (v4(198, 51, 100, 0), 24, "documentation"),
    (v4(203, 0, 113, 0), 24, "documentation"),
    (v4(224, 0, 0, 0), 4, "multicast"),
    (v4(240, 0, 0, 0), 4, "reserved"),
];

fn classify_v4(address: Ipv4Addr) -> Result<(), Refused> {
    let bits = u32::from(address);
    match V4.iter().find(|(network, length, _)| (bits ^ network) >> (32 - length) == 0) {
        Some(&(_, _, class)) => Err(Refused { class }),
        None => Ok(()),
    }
}

const V6: &[(Ipv6Addr, u32, &str)] = &[
    (Ipv6Addr::UNSPECIFIED, 128, "unspecified"),
    (Ipv6Addr::LOCALHOST, 128, "loopback"),
    (Ipv6Addr::UNSPECIFIED, 96, "ipv4_compatible"),
    (Ipv6Addr::new(0, 0, 0, 0, 0xffff, 0, 0, 0), 96, "ipv4_translated"),
    (Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0), 64, "discard"),
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 32, "teredo"),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32, "documentation"),
    (Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 7, "unique_local"),
    (Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10, "link_local"),
    (Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0), 10, "site_local"),
    (Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8, "multicast"),
];

fn classify_v6(address: Ipv6Addr) -> Result<(), Refused> {
    let bits = u128::from(address);
    if let Some(&(_, _, class)) =
        V6.iter().find(|(network, length, _)| (bits ^ u128::from(*network)) >> (128 - length) == 0)
    {
        return Err(Refused { class });
    }
    let b = address.octets();
    let last = Ipv4Addr::new(b[12], b[13], b[14], b[15]);
    match address.segments() {
        [0, 0, 0, 0, 0, 0xffff, ..] | [0x64, 0xff9b, 0, 0, 0, 0, ..] => classify_v4(last),
        // RFC 8215 leaves the prefix length inside 64:ff9b:1::/48 to the site, and RFC 6052 §2.2 puts the address
        // elsewhere for each: every reading that holds an address at all must be public.
        [0x64, 0xff9b, 1, ..] => {
            let readings = [
                Ipv4Addr::new(b[6], b[7], b[9], b[10]),
                Ipv4Addr::new(b[7], b[9], b[10], b[11]),
                Ipv4Addr::new(b[9], b[10], b[11], b[12]),
                last,
            ];
            let mut found = Err(Refused { class: "this_network" });
            for reading in readings.into_iter().filter(|reading| reading.octets()[0] != 0) {
                classify_v4(reading)?;
                found = Ok(());
            }
            found
        }
        [0x2002, ..] => classify_v4(Ipv4Addr::new(b[2], b[3], b[4], b[5])),
        _ => Ok(()),
    }
}

/// The class of a network all of whose addresses are non-public in one way, from its first to its last; `None` for any
/// other. An entry that names such a network means it, and one that is so wide that it holds them by the way does not.
pub fn class_of(network: IpAddr, prefix: u8) -> Option<&'static str> {
    let last = match network {
        IpAddr::V4(network) => {
            let hosts = u32::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
            IpAddr::V4((u32::from(network) | hosts).into())
        }
        IpAddr::V6(network) => {
            let hosts = u128::MAX.checked_shr(u32::from(prefix)).unwrap_or(0);
            IpAddr::V6((u128::from(network) | hosts).into())
        }
    };
    match (classify(network), classify(last)) {
        (Err(first), Err(last)) if first == last => Some(first.class),
        _ => None,
    }
}

/// A network in CIDR form; a bare address is a network of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cidr {
    network: IpAddr,
    length: u8,
}

/// Why a text is no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a network: {why}")]
pub struct CidrError {
    text: String,
    why: &'static str,
}

impl FromStr for Cidr {
    type Err = CidrError;

    fn from_str(text: &str) -> Result<Self, CidrError> {
        let refuse = |why| CidrError { text: text.to_owned(), why };
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let network: IpAddr = address.parse().map_err(|_| refuse("the address does not parse"))?;
        // Addresses are compared in their canonical form, so such an entry would quietly match nothing.
        if network.to_canonical() != network {
            return Err(refuse("write an IPv4-mapped network as the IPv4 one"));
        }
        let width = if network.is_ipv4() { 32 } else { 128 };
        let length = match length {
            None => width,
            Some(digits) if !digits.is_empty() && digits.bytes().all(|c| c.is_ascii_digit()) => {
                digits.parse().ok().filter(|&n| n <= width).ok_or_else(|| refuse("the prefix is too long"))?
            }
            Some(_) => return Err(refuse("the prefix length is not a number")),
        };
        let cidr = Self { network, length };
        if cidr.host_bits() != 0 {
            return Err(refuse("bits are set after the prefix"));
        }
        Ok(cidr)
    }
}

impl Cidr {
    /// Whether the network holds the address; an IPv4-mapped one counts as the IPv4 address.
    pub fn contains(&self, address: IpAddr) -> bool {
        let shift = |width: u8| u32::from(width - self.length);
        match (self.network, address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                (u32::from(network) ^ u32::from(address)).checked_shr(shift(32)).unwrap_or(0) == 0
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                (u128::from(network) ^ u128::from(address)).checked_shr(shift(128)).unwrap_or(0) == 0
            }
            _ => false,
        }
    }

    fn host_bits(&self) -> u128 {
        match self.network {
            IpAddr::V4(network) => {
                u128::from(u32::from(network)) & ((1_u128 << (32 - u32::from(self.length.min(32)))) - 1)
            }
            IpAddr::V6(network) => {
                let mask = 1_u128.checked_shl(128 - u32::from(self.length)).map_or(u128::MAX, |bit| bit - 1);
                u128::from(network) & mask
            }
        }
    }
}

/// The non-public networks that the configuration lets the proxy dial (`egress.allow_addresses`); empty by default.
#[derive(Clone, Debug, Default)]
pub struct AllowAddresses(Vec<Cidr>);

impl AllowAddresses {
    /// # Errors
    /// [`CidrError`] for the first text that is no network.
    pub fn parse<S: AsRef<str>>(networks: &[S]) -> Result<Self, CidrError> {
        networks.iter().map(|network| network.as_ref().parse()).collect::<Result<_, _>>().map(Self)
    }

    /// Whether the proxy may dial this address. A form that carries an IPv4 address (NAT64, 6to4) is let through only
    /// by a network that names the form itself.
    ///
    /// # Errors
    /// [`Refused`] as [`classify`], unless a network of the list holds the address.
    pub fn check(&self, address: IpAddr) -> Result<(), Refused> {
        if !guards::on(Guard::AddressClass) || self.0.iter().any(|network| network.contains(address)) {
            return Ok(());
        }
        classify(address)
    }
}

#[cfg(test)]
mod tests;
