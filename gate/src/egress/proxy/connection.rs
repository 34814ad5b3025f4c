//! One connection of a sandbox, from its first byte to its record. Each carries one tunnel or one request, so that there
//! is nothing after it that could be taken for another.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::Limits;
use super::count::Counted;
use super::dial::Dialer;
use super::forward;
use super::passthrough::{self, ACCESS_DENIED, Stop};
use super::reply::Reply;
use super::request::{Request, Target};
use super::session::Connection;
use super::source::{ReadError, Source};
use crate::egress::flow::{End, Protocol};

/// How long, and for how many bytes, a client that got its answer may go on sending before its socket is closed: a
/// socket that is closed with unread bytes resets the connection, and the answer is lost.
const LINGER_TIME: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 1024 * 1024;

/// The client's two directions.
pub struct Client {
    pub source: Source<ReadHalf<Counted>>,
    pub sink: WriteHalf<Counted>,
}

/// Serves a connection until it is over for any reason, the end of its execution included.
pub async fn serve(connection: Connection, stream: TcpStream, dialer: &Dialer, limits: &Limits) {
    let client = Counted::sandbox(stream, connection.counts.clone(), connection.state().budget.clone());
    let end = tokio::select! {
        biased;
        () = connection.state().over() => End::OpenAtClose,
        () = sleep(limits.connection_time) => End::TimeLimit,
        () = connection.counts.idle(limits.idle_time) => End::Idle,
        end = handle(&connection, client, dialer, limits) => end,
    };
    if !connection.has_ended() {
        connection.ended(if connection.counts.is_over_budget() { End::ByteLimit } else { end });
    }
}

async fn handle(connection: &Connection, client: Counted, dialer: &Dialer, limits: &Limits) -> End {
    let (read, sink) = tokio::io::split(client);
    let mut client = Client { source: Source::new(read), sink };
    let head = match timeout(limits.head_time, client.source.head()).await {
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
    connection.asked(&request.target);
    let head_only = request.forward.as_ref().is_some_and(|forward| forward.method == "HEAD");
    let upstream = match reach(connection, dialer, &request.target).await {
        Ok(upstream) => upstream,
        Err(reply) => return client.answer(connection, &reply, head_only).await,
    };
    match request.forward {
        None => tunnel(connection, client, upstream, &request.target, limits).await,
        Some(request_to_pass) if request.target.protocol == Protocol::Https => {
            match dialer.secure(upstream, &request.target.host).await {
                Ok(upstream) => forward::exchange(connection, client, upstream, &request_to_pass).await,
                Err(reply) => client.answer(connection, &reply, head_only).await,
            }
        }
        Some(request_to_pass) => forward::exchange(connection, client, upstream, &request_to_pass).await,
    }
}

async fn reach(connection: &Connection, dialer: &Dialer, target: &Target) -> Result<Counted, Reply> {
    let addresses = dialer.authorise(&connection.state().session.profile, target).await?;
    connection.allowed();
    let stream = dialer.connect(&addresses, |address| connection.dialled(address)).await?;
    Ok(Counted::upstream(stream, connection.counts.clone()))
}

/// Ports at which a tunnel holds TLS or nothing: https, and the mail, news, directory, DNS and SIP services that have a
/// port for TLS of their own. At others it may, and then it is looked at just the same.
const TLS_PORTS: [u16; 11] = [443, 465, 563, 636, 853, 989, 990, 992, 993, 995, 5061];
const TLS_HANDSHAKE: u8 = 0x16;

/// Joins the two sockets. TLS is passed on once the name in its ClientHello was compared with the name that was asked
/// for; what is inside is not looked at.
async fn tunnel(
    connection: &Connection,
    mut client: Client,
    upstream: Counted,
    target: &Target,
    limits: &Limits,
) -> End {
    if client.sink.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.is_err() {
        return End::ClientFailed;
    }
    let must_be_tls = TLS_PORTS.contains(&target.port);
    if must_be_tls {
        return tls(connection, client, upstream, target, limits).await;
    }
    // A server may speak first where nothing says that the client does: so both are listened to.
    let (read, up_sink) = tokio::io::split(upstream);
    let mut up_source = Source::new(read);
    let first = tokio::select! {
        first = client.source.some() => first.map(|bytes| bytes.first().copied()),
        _ = up_source.some() => Ok(None),
    };
    match first {
        Ok(Some(TLS_HANDSHAKE)) => {
            tls(connection, client, up_source.into_stream().unsplit(up_sink), target, limits).await
        }
        Ok(_) => plain(connection, client, up_source, up_sink).await,
        Err(_) => End::ClientFailed,
    }
}

async fn tls(connection: &Connection, mut client: Client, upstream: Counted, target: &Target, limits: &Limits) -> End {
    let stop = match timeout(limits.head_time, passthrough::hello(&mut client.source)).await {
        Err(_) => Stop::Refused("no_request"),
        Ok(Err(stop)) => stop,
        Ok(Ok(hello)) => match passthrough::judge(&hello, &target.host) {
            Err(rule) => Stop::Refused(rule),
            Ok(()) => match passthrough::join(connection, client, upstream, &target.host, &hello).await {
                Ok(end) => return end,
                Err((back, stop)) => {
                    client = back;
                    stop
                }
            },
        },
    };
    match stop {
        Stop::Over(End::Closed) => client.close(connection, End::Closed).await,
        Stop::Over(end) => end,
        Stop::Refused(rule) => client.alert(connection, rule).await,
    }
}

/// An end of one direction is passed on as such, and the other goes on.
async fn plain(
    connection: &Connection,
    mut client: Client,
    mut up_source: Source<ReadHalf<Counted>>,
    mut up_sink: WriteHalf<Counted>,
) -> End {
    let out = pump(&mut client.source, &mut up_sink, End::ClientFailed, End::UpstreamFailed);
    let back = pump(&mut up_source, &mut client.sink, End::UpstreamFailed, End::ClientFailed);
    match tokio::try_join!(out, back) {
        Ok(_) => {
            up_source.into_stream().unsplit(up_sink).finish();
            client.close(connection, End::Closed).await
        }
        Err(end) => end,
    }
}

pub async fn pump<S, W>(source: &mut Source<S>, sink: &mut W, reading: End, writing: End) -> Result<(), End>
where
    S: tokio::io::AsyncRead + Unpin,
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

impl Client {
    /// Gives the client an answer of the proxy's own, and notes it.
    pub async fn answer(mut self, connection: &Connection, reply: &Reply, head_only: bool) -> End {
        match reply {
            Reply::Denied { reason, detail: None, .. } => connection.refused(reason),
            Reply::Denied { reason, detail: Some(detail), .. } => connection.refused(&format!("{reason}:{detail}")),
            Reply::Invalid { .. } => connection.refused("malformed"),
            Reply::Slow => connection.refused("no_request"),
            Reply::Failed { reason, .. } => {
                connection.allowed();
                connection.failed(reason);
            }
        }
        let bytes = reply.to_bytes(&connection.decision_id(), head_only);
        if self.sink.write_all(&bytes).await.is_err() {
            return End::ClientFailed;
        }
        self.close(connection, End::Answered).await
    }

    /// Tells a client that speaks TLS that it is refused, and notes by which rule.
    pub async fn alert(mut self, connection: &Connection, rule: &str) -> End {
        connection.refused(rule);
        if self.sink.write_all(&ACCESS_DENIED).await.is_err() {
            return End::ClientFailed;
        }
        self.close(connection, End::Answered).await
    }

    /// Closes in order: what was written arrives. `end` stands from here on, even if the execution ends first.
    pub async fn close(self, connection: &Connection, end: End) -> End {
        connection.ended(end);
        let mut stream = self.source.into_stream().unsplit(self.sink);
        let _ = stream.shutdown().await;
        stream.finish();
        let mut rest = stream.take(LINGER_BYTES);
        let _ = timeout(LINGER_TIME, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
        end
    }
}
