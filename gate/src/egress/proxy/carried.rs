//! Connections of clients that know of no proxy: the kernel brought them here, and says where they were to go.

use std::net::{IpAddr, SocketAddr};

use super::client::Client;
use super::connection::Means;
use super::reply::Reply;
use super::request::Target;
use super::session::{Connection, Session};
use super::tunnel::{self, Way};
use crate::egress::address::Host;
use crate::egress::flow::{End, Protocol};

const DNS: u16 = 53;

pub async fn serve(connection: &Connection, client: Client, original: SocketAddr, means: &Means) -> End {
    connection.carried(original);
    let session = &connection.state().session;
    if original.port() == DNS {
        return names(connection, client).await;
    }
    let host = match host_of(session, original.ip()) {
        Ok(host) => host,
        Err(reply) => return client.refuse(connection, &reply).await,
    };
    let target = Target { host, port: original.port(), protocol: Protocol::Tcp };
    connection.asked(&target);
    match means.dialer.authorise(&session.profile, &target).await {
        Ok(permit) => {
            permit.note(connection);
            tunnel::carry(&Way { connection, means, target: &target, permit: &permit }, client, None).await
        }
        Err(reply) => client.refuse(connection, &reply).await,
    }
}

/// What the address stands for in this execution: a name that its resolver gave it for, or itself.
fn host_of(session: &Session, address: IpAddr) -> Result<Host, Reply> {
    match address.to_canonical() {
        IpAddr::V4(address) if matches!(address.octets(), [198, 18 | 19, ..]) => {
            let name = session.names.as_ref().and_then(|names| names.name_of(address));
            name.and_then(|name| Host::parse(&name).ok().filter(|host| matches!(host, Host::Name(_)))).ok_or_else(
                || {
                    Reply::denied(
                        "unknown_stand_in",
                        "the address stands for no name that this execution has asked for",
                    )
                },
            )
        }
        address => Ok(Host::Address(address)),
    }
}

/// Hands a stream of queries to the execution's resolver, whichever server they were for.
async fn names(connection: &Connection, client: Client) -> End {
    let Some(dns) = connection.state().session.dns.clone() else {
        return client.refuse(connection, &Reply::denied("no_resolver", "no resolver serves this execution")).await;
    };
    connection.spoken(Protocol::Dns);
    connection.allowed();
    let Some(from) = connection.client() else { return End::ClientFailed };
    let mut leg = client.into_leg();
    dns.serve(&mut leg, from).await;
    Client::new(Box::new(leg)).close(connection, End::Closed).await
}
