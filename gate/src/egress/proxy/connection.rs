//! One connection of a sandbox, from its first byte to its record.

use std::net::SocketAddr;

use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::client::Client;
use super::count::Counted;
use super::dial::Dialer;
use super::forward::{self, Outcome};
use super::leg::{Leg, Up};
use super::reply::Reply;
use super::request::Request;
use super::session::Connection;
use super::source::ReadError;
use super::tunnel::{self, Way};
use super::{Limits, carried};
use crate::egress::flow::{End, NameVerified, Protocol};
use crate::egress::profile::EntryProtocol;
use crate::egress::terminate::Authority;

/// What serves connections.
pub struct Means {
    pub dialer: Dialer,
    pub authority: Authority,
    pub limits: Limits,
}

/// Serves a connection until it is over for any reason, the end of its execution included. `original` is where it was
/// to go, if that was not the proxy.
pub async fn serve(connection: Connection, stream: TcpStream, original: Option<SocketAddr>, means: &Means) {
    let client = Counted::sandbox(stream, connection.counts.clone(), connection.state().budget.clone());
    let end = tokio::select! {
        biased;
        () = connection.state().over() => End::OpenAtClose,
        () = sleep(means.limits.connection_time) => End::TimeLimit,
        () = connection.counts.idle(means.limits.idle_time) => End::Idle,
        end = handle(&connection, Client::new(Box::new(client)), original, means) => end,
    };
    if !connection.has_ended() {
        connection.ended(if connection.counts.is_over_budget() { End::ByteLimit } else { end });
    }
}

async fn handle(connection: &Connection, client: Client, original: Option<SocketAddr>, means: &Means) -> End {
    match original {
        Some(original) => carried::serve(connection, client, original, means).await,
        None => asked(connection, client, means).await,
    }
}

/// Serves a client that knows that it speaks to a proxy: one tunnel, or one request with an absolute target, so that
/// there is nothing after it that could be taken for another.
async fn asked(connection: &Connection, mut client: Client, means: &Means) -> End {
    let head = match timeout(means.limits.head_time, client.source.head()).await {
        Err(_) => return client.answer(connection, &Reply::Slow, false).await,
        Ok(Ok(None)) => {
            return client.close(connection, End::Closed).await;
        }
        Ok(Ok(Some(head))) => head,
        Ok(Err(ReadError::Malformed(error))) => {
            return client.answer(connection, &Reply::Invalid { message: error.to_string() }, false).await;
        }
        Ok(Err(_)) => return End::ClientFailed,
    };
    let request = match Request::parse(&head) {
        Ok(request) => request,
        Err(error) => {
            return client.answer(connection, &Reply::Invalid { message: error.to_string() }, false).await;
        }
    };
    let target = &request.target;
    connection.asked(target);
    let head_only = request.forward.as_ref().is_some_and(|forward| forward.method == "HEAD");
    let permit = match means.dialer.authorise(&connection.state().session.profile, target).await {
        Ok(permit) => permit,
        Err(reply) => return client.answer(connection, &reply, head_only).await,
    };
    permit.note(connection);
    let way = Way { connection, means, target, permit: &permit };
    let Some(forward) = request.forward else {
        // Before anything is known of what is inside, so that what fails can still be said in HTTP.
        return match way.dial().await {
            Ok(upstream) => tunnel::serve(&way, client, upstream).await,
            Err(reply) => client.answer(connection, &reply, false).await,
        };
    };
    if let Err(reply) = permitted(&way, &forward.method) {
        return client.answer(connection, &reply, head_only).await;
    }
    connection.verified(Some(NameVerified::Host), false);
    let upstream: Result<Box<dyn Leg>, Reply> = match way.dial().await {
        Ok(upstream) if target.protocol == Protocol::Https => {
            means.dialer.secure(upstream, &target.host).await.map(boxed)
        }
        Ok(upstream) => Ok(boxed(upstream)),
        Err(reply) => Err(reply),
    };
    match upstream {
        Ok(upstream) => match forward::exchange(connection, client, Up::new(upstream), &forward).await {
            Outcome::Over(end) => end,
            Outcome::Again(client, up) => {
                up.finish();
                client.close(connection, End::Closed).await
            }
        },
        Err(reply) => client.answer(connection, &reply, head_only).await,
    }
}

fn boxed(leg: impl Leg + 'static) -> Box<dyn Leg> {
    Box::new(leg)
}

/// Whether the entry that permits the name permits such a request too.
fn permitted(way: &Way<'_>, method: &str) -> Result<(), Reply> {
    match (way.permit.protocol, way.target.protocol) {
        (EntryProtocol::Tls { .. }, Protocol::Http) => {
            Err(Reply::denied("protocol_not_allowed", "the profile of this action permits this name over TLS only"))
        }
        (EntryProtocol::Http, Protocol::Https) => {
            Err(Reply::denied("protocol_not_allowed", "the profile of this action permits this name over HTTP only"))
        }
        _ => way.permit.allows_method(method),
    }
}
