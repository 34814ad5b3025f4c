//! The resolver on its sockets.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::answer::{Asking, explain};
use super::books;
use super::message::{MAX_QUERY_BYTES, Malformed, Query, Transport};
use super::{Isolated, Shared};
use crate::egress::{DatagramAttribution, DatagramKey};

/// How many datagrams the end of an execution takes from one socket: more than a socket's buffer holds.
const SWEPT_DATAGRAMS: usize = 4096;

/// Bytes of queries, as the kernel reckons them (a short one is about 800), that wait at one socket: of one execution,
/// all that it may send at once (see `QUERIES_BURST` of the kernel program); of all, as much of a dozen of them.
const ISOLATED_BUFFER: usize = 1 << 19;
const SHARED_BUFFER: usize = 4 << 20;

/// Asks a socket's task to take all that has arrived.
pub type Sweep = oneshot::Sender<()>;

/// Who asks on a socket.
pub enum Whose {
    /// Any leaf of the gate's own namespace; the kernel's record says which.
    Shared { shared: Arc<Shared>, attribution: Arc<dyn DatagramAttribution> },
    /// Only the execution whose namespace the socket is in.
    Isolated { asking: Arc<Asking>, isolated: Isolated },
}

/// One socket of the resolver.
pub struct Slot {
    socket: UdpSocket,
    port: u16,
    whose: Whose,
}

impl Slot {
    pub fn new(socket: std::net::UdpSocket, whose: Whose) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let port = socket.local_addr()?.port();
        let wanted = match &whose {
            Whose::Shared { .. } => SHARED_BUFFER,
            Whose::Isolated { .. } => ISOLATED_BUFFER,
        };
        // Past `net.core.rmem_max` with CAP_NET_ADMIN (socket(7)); without it as much as that allows.
        if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, wanted).is_err() {
            rustix::net::sockopt::set_socket_recv_buffer_size(&socket, wanted)?;
        }
        Ok(Self { socket: UdpSocket::from_std(socket)?, port, whose })
    }

    /// Serves until the task is ended.
    pub async fn serve(self, mut sweeps: mpsc::Receiver<Sweep>) {
        // One more than is served, so that a datagram that was cut is seen to be too long.
        let mut buffer = vec![0; MAX_QUERY_BYTES + 1];
        loop {
            tokio::select! {
                received = self.socket.recv_from(&mut buffer) => match received {
                    Ok((length, client)) => self.take(buffer.get(..length).unwrap_or_default(), client).await,
                    Err(error) => {
                        tracing::warn!(%error, "the resolver could not receive");
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                },
                Some(done) = sweeps.recv() => {
                    for _ in 0..SWEPT_DATAGRAMS {
                        let Ok((length, client)) = receive_now(&self.socket, &mut buffer) else { break };
                        self.take(buffer.get(..length).unwrap_or_default(), client).await;
                    }
                    let _ = done.send(());
                }
            }
        }
    }

    async fn take(&self, message: &[u8], client: SocketAddr) {
        let Some(answer) = self.answer(message, client) else { return };
        // On the socket that was asked: the kernel puts the address there that the client believes it asked.
        let sent = self.socket.send_to(&answer, client).await;
        if let Err(error) = sent {
            tracing::debug!(%error, %client, "an answer could not be sent");
        }
    }

    fn answer(&self, message: &[u8], client: SocketAddr) -> Option<Vec<u8>> {
        let id = message.first_chunk().map(|id| u16::from_be_bytes(*id));
        let key = |netns| id.map(|id| DatagramKey { netns, source: client, slot_port: self.port, id });
        match &self.whose {
            Whose::Shared { shared, attribution } => {
                let asker = key(None).and_then(|key| attribution.asker(&key));
                match asker.ok_or("unattributed").and_then(|asker| shared.asking(asker.leaf).ok_or("no_session")) {
                    Ok(asking) => asking.answer(message, Transport::Udp, client),
                    Err(rule) => nobody(shared, message, client, rule),
                }
            }
            Whose::Isolated { asking, isolated } => match &isolated.attribution {
                None => asking.answer(message, Transport::Udp, client),
                Some(attribution) => {
                    match key(isolated.netns).and_then(|key| attribution.asker(&key)) {
                        Some(asker) if asker.leaf == asking.leaf() => asking.answer(message, Transport::Udp, client),
                        // The listener says one thing and the kernel another.
                        Some(_) => nobody(asking.shared(), message, client, "disputed"),
                        None => nobody(asking.shared(), message, client, "unattributed"),
                    }
                }
            },
        }
    }
}

/// Takes one datagram that is there already, whether or not the runtime has heard of it.
fn receive_now(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    let (_, length, client) = rustix::net::recvfrom(socket, buffer, rustix::net::RecvFlags::DONTWAIT)?;
    let client = client.ok_or(io::ErrorKind::InvalidData)?;
    Ok((length, client.try_into()?))
}

/// Refuses a query of which it cannot be proved whose it is. It is answered, so that what runs in a misconfigured
/// sandbox hears that this is no outage; past a rate, it is not.
fn nobody(shared: &Shared, message: &[u8], client: SocketAddr, rule: &'static str) -> Option<Vec<u8>> {
    if !shared.stranger_may_hear() {
        return None;
    }
    let query = match Query::parse(message) {
        Ok(query) => query,
        Err(Malformed { reply, .. }) => return reply.map(|reply| reply.to_bytes(Transport::Udp)),
    };
    let record = books::refusal(Some(query.printed()), rule, client);
    let text = explain(rule, &record.decision_id);
    tracing::debug!(%client, rule, decision_id = record.decision_id, "a DNS query that is nobody's was refused");
    shared.publish(record);
    Some(query.refused(&text).to_bytes(Transport::Udp))
}

/// Answers queries over a stream, each after its length in two bytes (RFC 1035 §4.2.2, RFC 7766), in the order in which
/// they come, until the client has no more or the execution is over.
pub async fn over_stream<S>(asking: &Asking, mut stream: S, client: SocketAddr)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let patience = asking.shared().limits.stream_time;
    let served = async {
        let mut message = Vec::new();
        loop {
            let length = usize::from(timeout(patience, stream.read_u16()).await??);
            if length == 0 || length > MAX_QUERY_BYTES {
                asking.note_malformed(client);
                return Ok(());
            }
            message.resize(length, 0);
            timeout(patience, stream.read_exact(&mut message)).await??;
            let Some(answer) = asking.answer(&message, Transport::Tcp, client) else { return Ok(()) };
            let Ok(length) = u16::try_from(answer.len()) else { return Ok(()) };
            timeout(patience, stream.write_all(&[&length.to_be_bytes(), answer.as_slice()].concat())).await??;
        }
    };
    let served: io::Result<()> = tokio::select! {
        served = served => served,
        () = asking.over() => return,
    };
    // A client that has no more to ask closes, which is an end of file here.
    if let Err(error) =
        served.or_else(|error| if error.kind() == io::ErrorKind::UnexpectedEof { Ok(()) } else { Err(error) })
    {
        tracing::debug!(%error, %client, "a DNS connection broke");
    }
    let _ = timeout(patience, stream.shutdown()).await;
}
