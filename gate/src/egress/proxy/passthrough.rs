//! TLS that is passed through: the name in the ClientHello is compared with the name that was asked for, and then
//! nothing more is seen.
//!
//! A server may ask for a second hello (HelloRetryRequest, RFC 8446 §4.1.4), and some servers take the name from that
//! one. So the client's records are followed until the server's first message says that there will be none, and a
//! second hello is judged like the first.

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;

use super::client::Client;
use super::count::Counted;
use super::leg::Up;
use super::session::Connection;
use super::source::Source;
use super::tunnel::pump;
use crate::egress::address::Host;
use crate::egress::client_hello::{Parsed, Reader};
use crate::egress::flow::End;
use crate::guards::{self, Guard};

const RECORD_HEADER: usize = 5;
const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const SERVER_HELLO: u8 = 2;
/// The random value of a ServerHello that is a HelloRetryRequest: SHA-256 of that word (RFC 8446 §4.1.3).
pub const RETRY: [u8; 32] = [
    0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2, 0xa2, 0x11,
    0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
];

/// Why a tunnel is not, or no longer, served.
#[derive(Debug)]
pub enum Stop {
    /// By this rule; the client is told.
    Refused(&'static str),
    Over(End),
}

/// Waits for the whole hello, which stays in the source.
///
/// # Errors
/// [`Stop`]: `not_tls` for anything else, as soon as it shows.
pub async fn hello<S: AsyncRead + Unpin>(source: &mut Source<S>) -> Result<Parsed, Stop> {
    let mut reader = Reader::default();
    loop {
        match reader.read(source.pending()) {
            Ok(Some(parsed)) => return Ok(parsed),
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(why = error.why, "a hello was refused");
                return Err(Stop::Refused("not_tls"));
            }
        }
        match source.more().await {
            Ok(0) if source.pending().is_empty() => return Err(Stop::Over(End::Closed)),
            Ok(0) | Err(_) => return Err(Stop::Over(End::ClientFailed)),
            Ok(_) => {}
        }
    }
}

/// Whether the hello asks for what was asked of the proxy. Bytes are compared as they were sent: what a server makes of
/// an escape or of a dot at the end is not guessed.
///
/// # Errors
/// The rule that refuses it.
pub fn judge(hello: &Parsed, asked: &Host) -> Result<(), &'static str> {
    if hello.ech {
        return Err("ech");
    }
    judge_name(hello, asked)
}

/// The same for a hello that the gate itself answers: one that is hidden in it is not heard by anybody.
///
/// # Errors
/// The rule that refuses it.
pub fn judge_name(hello: &Parsed, asked: &Host) -> Result<(), &'static str> {
    if !guards::on(Guard::Sni) {
        return Ok(());
    }
    match (asked, &hello.sni) {
        (Host::Name(name), Some(sni)) if sni.eq_ignore_ascii_case(name) => Ok(()),
        (Host::Name(_), None) => Err("sni_missing"),
        // An address has no name that a server could choose by (RFC 6066 §3).
        (Host::Address(_), None) => Ok(()),
        (_, Some(_)) => Err("sni_mismatch"),
    }
}

/// Passes a judged hello and everything after it.
pub async fn join(
    connection: &Connection,
    mut client: Client,
    upstream: Counted,
    asked: &Host,
    hello: &Parsed,
) -> Result<End, (Client, Stop)> {
    let mut up = Up::new(Box::new(upstream));
    let (decided, retry) = watch::channel(None);
    let joined = {
        let out = async {
            forward(&mut client.source, &mut up.sink, hello.length).await?;
            follow(&mut client.source, &mut up.sink, asked, retry).await?;
            pump(&mut client.source, &mut up.sink, End::ClientFailed, End::UpstreamFailed).await.map_err(Stop::Over)
        };
        let back = async {
            let found = is_retry(&mut up.source).await;
            decided.send_replace(Some(found));
            pump(&mut up.source, &mut client.sink, End::UpstreamFailed, End::ClientFailed).await.map_err(Stop::Over)
        };
        tokio::try_join!(out, back)
    };
    match joined {
        Ok(_) => {
            up.finish();
            Ok(client.close(connection, End::Closed).await)
        }
        Err(stop) => Err((client, stop)),
    }
}

/// Follows the client's records until it is known that no other hello comes, or until that was judged.
async fn follow<S, W>(
    source: &mut Source<S>,
    sink: &mut W,
    asked: &Host,
    mut retry: watch::Receiver<Option<bool>>,
) -> Result<(), Stop>
where
    S: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    loop {
        while source.pending().len() < RECORD_HEADER {
            match source.more().await {
                Ok(0) if source.pending().is_empty() => return Ok(()),
                Ok(0) | Err(_) => return Err(Stop::Over(End::ClientFailed)),
                Ok(_) => {}
            }
            if *retry.borrow() == Some(false) {
                return Ok(());
            }
        }
        let (kind, length) = match source.pending() {
            &[kind, _, _, high, low, ..] => (kind, usize::from(high) << 8 | usize::from(low)),
            _ => return Err(Stop::Over(End::ClientFailed)),
        };
        match kind {
            // Early data, and what goes with it.
            CHANGE_CIPHER_SPEC | ALERT | APPLICATION_DATA => forward(source, sink, RECORD_HEADER + length).await?,
            HANDSHAKE => {
                // No client that keeps to the protocol sends one before it has heard of the server.
                let retried = retry.wait_for(Option::is_some).await.is_ok_and(|retry| *retry == Some(true));
                if retried {
                    let second = hello(source).await?;
                    judge(&second, asked).map_err(Stop::Refused)?;
                    forward(source, sink, second.length).await?;
                }
                return Ok(());
            }
            _ => return Err(Stop::Refused("not_tls")),
        }
    }
}

async fn forward<S, W>(source: &mut Source<S>, sink: &mut W, bytes: usize) -> Result<(), Stop>
where
    S: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut left = bytes;
    while left > 0 {
        let pending = source.some().await.map_err(|_| Stop::Over(End::ClientFailed))?;
        if pending.is_empty() {
            return Err(Stop::Over(End::ClientFailed));
        }
        let take = left.min(pending.len());
        sink.write_all(pending.get(..take).unwrap_or_default()).await.map_err(|_| Stop::Over(End::UpstreamFailed))?;
        source.consume(take);
        left -= take;
    }
    Ok(())
}

/// Whether the server's first message asks for another hello. What was read for that stays in the source.
async fn is_retry<S: AsyncRead + Unpin>(source: &mut Source<S>) -> bool {
    loop {
        match first_message(source.pending()) {
            Some(message) => {
                return message.first() == Some(&SERVER_HELLO) && message.get(6..38) == Some(&RETRY);
            }
            None => match source.more().await {
                Ok(0) | Err(_) => return false,
                Ok(_) => {}
            },
        }
    }
}

/// As much of the first handshake message as says what it is; empty for what is none; `None` when more is needed.
fn first_message(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut message = Vec::new();
    let mut rest = bytes;
    loop {
        match *rest {
            [] => return None,
            [HANDSHAKE, _, _, high, low, ref after @ ..] => {
                let length = usize::from(high) << 8 | usize::from(low);
                if length == 0 {
                    return Some(Vec::new());
                }
                message.extend_from_slice(after.get(..length).unwrap_or(after));
                if message.len() >= 38 || message.first().is_some_and(|&kind| kind != SERVER_HELLO) {
                    return Some(message);
                }
                rest = after.get(length..).unwrap_or_default();
            }
            [HANDSHAKE, ..] => return None,
            _ => return Some(Vec::new()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_of_a_retry_is_what_the_rfc_says() {
        use sha2::Digest;
        assert_eq!(sha2::Sha256::digest(b"HelloRetryRequest").as_slice(), RETRY);
    }

    #[test]
    fn names_are_compared_as_they_were_sent() {
        let hello = |sni: Option<&str>| Parsed { sni: sni.map(str::to_owned), ..Parsed::default() };
        let name = Host::Name("origin.test".to_owned());
        let address = Host::Address("192.0.2.1".parse().unwrap());
        for sni in ["origin.test", "ORIGIN.Test"] {
            assert_eq!(judge(&hello(Some(sni)), &name), Ok(()));
        }
        for sni in ["other.test", "sub.origin.test", "origin.test.", "origin.tes", "192.0.2.1"] {
            assert_eq!(judge(&hello(Some(sni)), &name), Err("sni_mismatch"), "{sni}");
        }
        assert_eq!(judge(&hello(None), &name), Err("sni_missing"));
        assert_eq!(judge(&hello(None), &address), Ok(()));
        assert_eq!(judge(&hello(Some("192.0.2.1")), &address), Err("sni_mismatch"));
        let hidden = Parsed { ech: true, ..hello(Some("origin.test")) };
        assert_eq!(judge(&hidden, &name), Err("ech"));
    }
}
