//! One request to an origin and its answer, streamed both ways through one small buffer each.

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use super::client::Client;
use super::head::{Fields, Framing, Malformed, ResponseHead, Version};
use super::leg::Up;
use super::reply::Reply;
use super::request::{Forward, VIA};
use super::session::Connection;
use super::source::{Body, ReadError, Source};
use crate::egress::flow::End;

/// Interim answers (RFC 9110 §15.2) that are passed over before the final one.
const MAX_INTERIM: u32 = 8;

/// What is left after an exchange.
pub enum Outcome {
    /// Nothing: the client has been told, or cut.
    Over(End),
    /// Both sides, ready for another.
    Again(Client, Up),
}

enum Failure {
    /// The client broke off, or could not be written to.
    Client,
    /// The client's body is none.
    Body(Malformed),
    /// The origin broke off, or sent no answer that can be passed on.
    Upstream(String),
}

/// Sends the request and passes the answer on. Both sides are kept where the request and the answer leave them open.
pub async fn exchange(connection: &Connection, mut client: Client, mut up: Up, request: &Forward) -> Outcome {
    if request.expects_continue && request.version == Version::Http11 {
        let go_on = client.sink.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await;
        if go_on.is_err() || client.sink.flush().await.is_err() {
            return Outcome::Over(End::ClientFailed);
        }
    }
    let mut started = false;
    // Over in any way, and with all of the request on its way: only then is the client's next byte another request's.
    let (mut sent, mut whole) = (false, false);
    let outcome = {
        let send = send(request, &mut client.source, &mut up.sink);
        let receive = receive(request, &mut up.source, &mut client.sink, &mut started);
        tokio::pin!(send, receive);
        loop {
            tokio::select! {
                result = &mut send, if !sent => {
                    sent = true;
                    match result {
                        Ok(()) => whole = true,
                        // An origin that stops reading may still say why.
                        Err(Failure::Upstream(_)) => {}
                        Err(failure) => break Err(failure),
                    }
                }
                result = &mut receive => break result,
            }
        }
    };
    let end = match outcome {
        Ok(true) if whole => return Outcome::Again(client, up),
        Ok(_) => {
            if sent {
                up.finish();
            }
            client.close(connection, End::Closed).await
        }
        Err(Failure::Client) => End::ClientFailed,
        Err(_) if connection.counts.is_over_budget() => End::ByteLimit,
        // The head has gone out: all that is left is to break off, so that nobody takes the part for the whole.
        Err(Failure::Body(_)) if started => End::ClientFailed,
        Err(Failure::Upstream(_)) if started => {
            connection.failed("bad_response");
            End::UpstreamFailed
        }
        Err(Failure::Body(error)) => {
            client.answer(connection, &Reply::Invalid { message: error.to_string() }, request.method == "HEAD").await
        }
        Err(Failure::Upstream(message)) => {
            client.answer(connection, &Reply::failed("bad_response", message), request.method == "HEAD").await
        }
    };
    Outcome::Over(end)
}

async fn send<R, W>(request: &Forward, source: &mut Source<R>, sink: &mut W) -> Result<(), Failure>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let gone = |error: std::io::Error| Failure::Upstream(error.to_string());
    sink.write_all(&request.to_head()).await.map_err(gone)?;
    sink.flush().await.map_err(gone)?;
    let mut body = Body::new(request.framing);
    let chunked = request.framing == Framing::Chunked;
    let (mut data, mut out) = (Vec::new(), Vec::new());
    loop {
        data.clear();
        match body.next(source, &mut data).await {
            Ok(true) => {
                frame(&mut out, &data, chunked);
                sink.write_all(&out).await.map_err(gone)?;
                sink.flush().await.map_err(gone)?;
            }
            Ok(false) => break,
            Err(ReadError::Malformed(error)) => return Err(Failure::Body(error)),
            Err(_) => return Err(Failure::Client),
        }
    }
    if chunked {
        sink.write_all(b"0\r\n\r\n").await.map_err(gone)?;
        sink.flush().await.map_err(gone)?;
    }
    Ok(())
}

async fn receive<R, W>(
    request: &Forward,
    source: &mut Source<R>,
    sink: &mut W,
    started: &mut bool,
) -> Result<bool, Failure>
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let response = final_head(source).await?;
    let framing = response.framing(&request.method).map_err(bad)?;
    let unbounded = matches!(framing, Framing::Chunked | Framing::UntilClose);
    // A 1.0 client is given no coding; for it the body ends with the connection.
    let chunked = unbounded && request.version == Version::Http11;
    let again = request.keeps_alive && framing != Framing::UntilClose && response.keeps_alive();
    *started = true;
    sink.write_all(&client_head(&response, request, framing, chunked, again)).await.map_err(|_| Failure::Client)?;
    let mut body = Body::new(framing);
    let (mut data, mut out) = (Vec::new(), Vec::new());
    loop {
        data.clear();
        match body.next(source, &mut data).await {
            Ok(true) => {
                frame(&mut out, &data, chunked);
                sink.write_all(&out).await.map_err(|_| Failure::Client)?;
            }
            Ok(false) => break,
            Err(error) => return Err(Failure::Upstream(error.to_string())),
        }
    }
    if chunked {
        sink.write_all(b"0\r\n\r\n").await.map_err(|_| Failure::Client)?;
    }
    sink.flush().await.map_err(|_| Failure::Client)?;
    Ok(again)
}

fn bad(error: Malformed) -> Failure {
    Failure::Upstream(format!("the origin's answer is not HTTP/1.1: {error}"))
}

async fn final_head<R: AsyncRead + Unpin>(source: &mut Source<R>) -> Result<ResponseHead, Failure> {
    for _ in 0..=MAX_INTERIM {
        let head = match source.head().await {
            Ok(Some(head)) => head,
            Ok(None) => return Err(Failure::Upstream("the origin closed without an answer".to_owned())),
            Err(ReadError::Malformed(error)) => return Err(bad(error)),
            Err(error) => return Err(Failure::Upstream(error.to_string())),
        };
        let response = ResponseHead::parse(&head).map_err(bad)?;
        match response.status {
            // Upgrade is not passed on, so nobody asked for this.
            101 => return Err(Failure::Upstream("the origin switched protocols unasked".to_owned())),
            100..=199 => {}
            _ => return Ok(response),
        }
    }
    Err(Failure::Upstream("too many interim answers".to_owned()))
}

fn client_head(response: &ResponseHead, request: &Forward, framing: Framing, chunked: bool, again: bool) -> Vec<u8> {
    let mut fields: Fields = response.fields.clone();
    fields.remove_hop_by_hop();
    // The length that a HEAD or 304 answer announces is of a body that is not sent.
    if framing != Framing::None || !(request.method == "HEAD" || response.status == 304) {
        fields.remove(&["content-length"]);
    }
    match framing {
        Framing::Length(bytes) => fields.push("Content-Length", bytes.to_string()),
        _ if chunked => fields.push("Transfer-Encoding", "chunked"),
        _ => {}
    }
    fields.push("Via", VIA);
    if !again {
        fields.push("Connection", "close");
    }
    let mut out = format!("HTTP/1.1 {} ", response.status).into_bytes();
    out.extend_from_slice(&response.reason);
    out.extend_from_slice(b"\r\n");
    fields.write(&mut out);
    out
}

/// Puts a piece of a body into the framing it goes out in.
fn frame(out: &mut Vec<u8>, data: &[u8], chunked: bool) {
    out.clear();
    if chunked {
        out.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
    }
    out.extend_from_slice(data);
    if chunked {
        out.extend_from_slice(b"\r\n");
    }
}
