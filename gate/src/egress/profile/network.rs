//! Addresses that no name stands for.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{EntryProtocol, default_ports};
use crate::egress::address;

/// An address and the length of its prefix, in bits; nothing is set after the prefix. Never a form of IPv6 that stands
/// for an IPv4 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

/// One rule of an allowlist for addresses: a network, at some ports.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NetworkEntry {
    pub(super) network: Network,
    /// Sorted, without repetitions, never empty.
    pub(super) ports: Vec<u16>,
    pub(super) protocol: EntryProtocol,
}

/// Why an entry's `cidr` is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    #[error("cidr {text:?} is not an address and a prefix, as 10.1.0.0/16")]
    NotANetwork { text: String },
    #[error("cidr {text:?} has bits set after its prefix; the network is {network}")]
    HostBits { text: String, network: Network },
    #[error("cidr {text:?}: write it as the IPv4 network that it stands for")]
    Mapped { text: String },
    #[error("cidr {text:?} is too wide: at least /{least}")]
    TooWide { text: String, least: u8 },
    #[error("cidr {text:?} has no address that a connection could be made to ({class})")]
    NotUnicast { text: String, class: &'static str },
    #[error("cidr {text:?} meets {STAND_INS}, which the gate uses itself")]
    StandIns { text: String },
}

/// The addresses that stand for names inside sandboxes.
const STAND_INS: Network = Network { address: IpAddr::V4(Ipv4Addr::new(198, 18, 0, 0)), prefix: 15 };
/// The shortest prefixes that an entry may have. Shorter ones come near "everything", which two of them would be.
const LEAST_V4: u8 = 8;
const LEAST_V6: u8 = 16;
/// Of the local networks of IPv6 (RFC 4193) all may be named at once.
const UNIQUE_LOCAL: Network = Network { address: IpAddr::V6(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0)), prefix: 7 };

impl Network {
    /// Reads `address/prefix`. An entry has more rules: [`Network::parse_entry`].
    ///
    /// # Errors
    /// [`NetworkError`] for what is not a network in its one spelling.
    pub fn parse(text: &str) -> Result<Self, NetworkError> {
        let text = || text.to_owned();
        let (address, prefix) = read(&text()).ok_or_else(|| NetworkError::NotANetwork { text: text() })?;
        if address.to_canonical() != address {
            return Err(NetworkError::Mapped { text: text() });
        }
        let network = Self { address: masked(address, prefix), prefix };
        if network.address != address {
            return Err(NetworkError::HostBits { text: text(), network });
        }
        Ok(network)
    }

    /// Reads the `cidr` of an entry, and a remark for whoever lints the manifest.
    ///
    /// # Errors
    /// [`NetworkError`] also for networks that are too wide, of no hosts, or the gate's own.
    pub fn parse_entry(text: &str) -> Result<(Self, Option<String>), NetworkError> {
        let network = Self::parse(text)?;
        let text = || text.to_owned();
        let least = match network.address {
            IpAddr::V4(_) => LEAST_V4,
            IpAddr::V6(_) if UNIQUE_LOCAL.covers(network) => UNIQUE_LOCAL.prefix,
            IpAddr::V6(_) => LEAST_V6,
        };
        if network.prefix < least {
            return Err(NetworkError::TooWide { text: text(), least });
        }
        if network.intersect(STAND_INS).is_some() {
            return Err(NetworkError::StandIns { text: text() });
        }
        let remark = match address::classify(network.address).err().map(|refused| refused.class) {
            Some(class @ ("this_network" | "multicast" | "broadcast" | "reserved" | "unspecified")) => {
                return Err(NetworkError::NotUnicast { text: text(), class });
            }
            Some("loopback") => Some(format!("{network} is the gate's own machine: whatever listens there is reached")),
            Some("link_local" | "cloud_platform") => Some(format!(
                "{network} may hold a cloud's metadata service, which gives the machine's credentials away"
            )),
            _ => None,
        };
        Ok((network, remark))
    }

    pub const fn address(self) -> IpAddr {
        self.address
    }

    /// In bits.
    pub const fn prefix(self) -> u8 {
        self.prefix
    }

    fn of(address: IpAddr, prefix: u8) -> Self {
        let (address, prefix) = match address.to_canonical() {
            IpAddr::V4(inner) if address.is_ipv6() => (IpAddr::V4(inner), prefix.saturating_sub(96)),
            IpAddr::V4(_) => (address, prefix.min(32)),
            IpAddr::V6(_) => (address, prefix.min(128)),
        };
        Self { address: masked(address, prefix), prefix }
    }

    /// A mapped address counts as the IPv4 address in it.
    pub fn contains(self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.address.is_ipv4() && masked(address, self.prefix) == self.address
    }

    fn covers(self, other: Self) -> bool {
        other.prefix >= self.prefix && self.contains(other.address)
    }

    /// The addresses that both have: two networks lie one within the other or apart.
    pub(super) fn intersect(self, other: Self) -> Option<Self> {
        if self.covers(other) { Some(other) } else { other.covers(self).then_some(self) }
    }
}

fn read(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let digits = prefix.len() <= 3 && prefix.bytes().all(|byte| byte.is_ascii_digit());
    let prefix: u8 = prefix.parse().ok().filter(|_| digits)?;
    (prefix <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, prefix))
}

/// The address with everything after the prefix at zero.
fn masked(address: IpAddr, prefix: u8) -> IpAddr {
    let prefix = u32::from(prefix);
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(prefix)).unwrap_or(0);
            Ipv4Addr::from(u32::from(address) & mask).into()
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(prefix)).unwrap_or(0);
            Ipv6Addr::from(u128::from(address) & mask).into()
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl NetworkEntry {
    /// The network of the first `prefix` bits of `address`; `ports` empty means [`super::DEFAULT_PORTS`].
    pub fn new(address: IpAddr, prefix: u8, ports: impl IntoIterator<Item = u16>, protocol: EntryProtocol) -> Self {
        Self { network: Network::of(address, prefix), ports: default_ports(ports), protocol }
    }

    /// Its address, and the length of its prefix in bits.
    pub const fn network(&self) -> (IpAddr, u8) {
        (self.network.address, self.network.prefix)
    }

    pub fn ports(&self) -> &[u16] {
        &self.ports
    }

    pub const fn protocol(&self) -> EntryProtocol {
        self.protocol
    }

    /// Whether this entry's rule holds where the other would have another one.
    pub(super) fn overrules(&self, other: &Self, port: u16) -> bool {
        self.network == other.network && self.protocol != other.protocol && self.ports.contains(&port)
    }
}

impl fmt::Display for NetworkEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}{}", self.network, super::ports_text(&self.ports), self.protocol.suffix())
    }
}
