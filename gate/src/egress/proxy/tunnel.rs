//! What goes through a connection once it is known where to: held to the protocol of the entry that permits it.

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use super::client::{Client, TLS_HANDSHAKE};
use super::connection::Means;
use super::count::Counted;
use super::dial::Permit;
use super::inside;
use super::leg::{Leg, Up};
use super::passthrough::{self, Stop};
use super::reply::Reply;
use super::request::Target;
use super::session::Connection;
use super::source::Source;
use crate::egress::address::Host;
use crate::egress::flow::{End, NameVerified, Protocol};
use crate::egress::profile::EntryProtocol;

/// A connection that is permitted, and to where.
pub struct Way<'a> {
    pub connection: &'a Connection,
    pub means: &'a Means,
    pub target: &'a Target,
    pub permit: &'a Permit,
}

impl Way<'_> {
    /// Connects to the origin. From here on the record says that it was allowed.
    pub async fn dial(&self) -> Result<Counted, Reply> {
        self.connection.allowed();
        let stream =
            self.means.dialer.connect(&self.permit.addresses, |address| self.connection.dialled(address)).await?;
        Ok(Counted::upstream(stream, self.connection.counts.clone()))
    }
}

/// Serves a CONNECT line that was allowed.
pub async fn serve(way: &Way<'_>, mut client: Client, upstream: Counted) -> End {
    if client.sink.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.is_err() {
        return End::ClientFailed;
    }
    carry(way, client, Some(upstream)).await
}

/// Carries what the client sends. Without `dialled` the origin is connected to when it is known that it may be.
pub async fn carry(way: &Way<'_>, mut client: Client, dialled: Option<Counted>) -> End {
    let terminate = match way.permit.protocol {
        EntryProtocol::Tcp => return bytes(way, client, dialled).await,
        EntryProtocol::Http => return inside::serve(way, client, dialled, false).await,
        EntryProtocol::Tls { terminate } => terminate,
        EntryProtocol::Auto => {
            let first = match timeout(way.means.limits.head_time, client.source.some()).await {
                Ok(Ok(bytes)) => bytes.first().copied(),
                Ok(Err(_)) => return End::ClientFailed,
                Err(_) => return client.refuse(way.connection, &Reply::Slow).await,
            };
            match first {
                Some(TLS_HANDSHAKE) => false,
                Some(_) => return inside::serve(way, client, dialled, false).await,
                None => return client.close(way.connection, End::Closed).await,
            }
        }
    };
    let stop = match tls(way, client, dialled, terminate).await {
        Ok(end) => return end,
        Err(stop) => stop,
    };
    match stop {
        (client, Stop::Over(End::Closed)) => client.close(way.connection, End::Closed).await,
        (_, Stop::Over(end)) => end,
        (client, Stop::Refused(rule)) => client.refuse(way.connection, &refusal(rule)).await,
    }
}

fn refusal(rule: &'static str) -> Reply {
    let message = match rule {
        "sni_mismatch" => "the server name of the ClientHello is not the name that was asked for",
        "sni_missing" => "the ClientHello has no server name",
        "ech" => "the ClientHello is encrypted, or looks as if it were",
        "no_request" => return Reply::Slow,
        _ => "the profile of this action permits this name over TLS only, and this is not TLS",
    };
    Reply::denied(rule, message)
}

async fn tls(
    way: &Way<'_>,
    mut client: Client,
    dialled: Option<Counted>,
    terminate: bool,
) -> Result<End, (Client, Stop)> {
    let connection = way.connection;
    connection.spoken(Protocol::Tls);
    let hello = match timeout(way.means.limits.head_time, passthrough::hello(&mut client.source)).await {
        Err(_) => return Err((client, Stop::Refused("no_request"))),
        Ok(Err(stop)) => return Err((client, stop)),
        Ok(Ok(hello)) => hello,
    };
    connection.named(hello.sni.as_deref());
    let host = &way.target.host;
    // What the proxy reads by itself cannot be hidden from it.
    let judged = if terminate { passthrough::judge_name(&hello, host) } else { passthrough::judge(&hello, host) };
    if let Err(rule) = judged {
        return Err((client, Stop::Refused(rule)));
    }
    if terminate {
        return Ok(terminated(way, client, dialled).await);
    }
    let verified = matches!(host, Host::Name(_)).then_some(NameVerified::Sni);
    connection.verified(verified, true);
    let upstream = match dialled {
        Some(upstream) => upstream,
        None => match way.dial().await {
            Ok(upstream) => upstream,
            Err(reply) => return Ok(client.refuse(connection, &reply).await),
        },
    };
    passthrough::join(connection, client, upstream, host, &hello).await
}

/// Ends the client's TLS here, with a certificate of the gate's own, to see the requests inside.
async fn terminated(way: &Way<'_>, client: Client, dialled: Option<Counted>) -> End {
    let connection = way.connection;
    connection.allowed();
    let config = match way.means.authority.config(&way.target.host) {
        Ok(config) => config,
        Err(error) => {
            tracing::error!(%error, "no certificate for a name of a profile");
            return client.refuse(connection, &Reply::failed("tls_name", "no certificate can be for this name")).await;
        }
    };
    let accepting = TlsAcceptor::from(config).accept(client.into_leg()).into_fallible();
    match timeout(way.means.limits.head_time, accepting).await {
        Ok(Ok(stream)) => inside::serve(way, Client::new(Box::new(stream)), dialled, true).await,
        Ok(Err((error, leg))) => {
            // Most often a client that keeps a list of authorities of its own.
            tracing::debug!(%error, "a client did not take the gate's certificate");
            connection.failed("client_tls");
            Client::new(Box::new(leg)).close(connection, End::ClientFailed).await
        }
        Err(_) => {
            connection.failed("client_tls");
            End::ClientFailed
        }
    }
}

/// Joins the two sides without looking at what passes.
async fn bytes(way: &Way<'_>, client: Client, dialled: Option<Counted>) -> End {
    let connection = way.connection;
    connection.spoken(Protocol::Tcp);
    connection.verified(matches!(way.target.host, Host::Name(_)).then_some(NameVerified::Dns), true);
    let upstream = match dialled {
        Some(upstream) => upstream,
        None => match way.dial().await {
            Ok(upstream) => upstream,
            Err(reply) => return client.refuse(connection, &reply).await,
        },
    };
    let (mut client, mut up) = (client, Up::new(Box::new(upstream)));
    let out = pump(&mut client.source, &mut up.sink, End::ClientFailed, End::UpstreamFailed);
    let back = pump(&mut up.source, &mut client.sink, End::UpstreamFailed, End::ClientFailed);
    match tokio::try_join!(out, back) {
        Ok(_) => {
            up.finish();
            client.close(connection, End::Closed).await
        }
        Err(end) => end,
    }
}

/// Passes one direction on, and its end as such.
pub async fn pump<S, W>(source: &mut Source<S>, sink: &mut W, reading: End, writing: End) -> Result<(), End>
where
    S: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    loop {
        let data = source.some().await.map_err(|_| reading)?;
        let length = data.len();
        if length == 0 {
            return sink.shutdown().await.map_err(|_| writing);
        }
        sink.write_all(data).await.map_err(|_| writing)?;
        source.consume(length);
    }
}

/// The origin's side, connected to now if it was not before.
pub async fn open(way: &Way<'_>, dialled: Option<Counted>, secure: bool) -> Result<Box<dyn Leg>, Reply> {
    let upstream = match dialled {
        Some(upstream) => upstream,
        None => way.dial().await?,
    };
    if secure {
        Ok(Box::new(way.means.dialer.secure(upstream, &way.target.host).await?))
    } else {
        Ok(Box::new(upstream))
    }
}
