//! The worker of HTTP actions: what runs in the sandbox for `builtin:http_api`. It speaks to the proxy and to nothing
//! else; names, addresses, TLS and the profile are the proxy's business.
//!
//! One JSON job on stdin, one JSON answer on stdout. One thread and the standard library: an execution pays for what
//! starts here.
//!
//! The answer's `headers` is an object of lower-case names. A name that came more than once has its values joined by
//! `, ` (RFC 9110 §5.3), `set-cookie` by a newline, since cookies hold commas. `body` is the text; when the bytes are
//! not UTF-8 it is their base64 and `body_encoding` is `base64`. Redirects are answers like any other.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::egress::proxy::DECISION_ID;
use crate::egress::proxy::chunked::Decoder;
use crate::egress::proxy::head::{
    Fields, Framing, MAX_HEAD_BYTES, Malformed, ResponseHead, end_of_head, is_field_content, is_token,
};

/// Fields that this worker or the proxy decides; a job that sets one is refused.
const OURS: &[&str] = &[
    "host",
    "content-length",
    "transfer-encoding",
    "connection",
    "expect",
    "te",
    "trailer",
    "upgrade",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
];
const READ_BYTES: usize = 16 * 1024;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Job {
    /// `address:port` of the proxy.
    proxy: SocketAddr,
    method: String,
    url: String,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    #[serde(default)]
    body: Option<String>,
    /// Of the body, after its transfer coding is undone.
    max_response_bytes: u64,
    /// For everything from connect to the last byte.
    timeout_ms: u64,
}

/// Why there is no answer from an origin.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    InvalidJob(String),
    #[error("the proxy could not be reached: {0}")]
    ProxyUnreachable(io::Error),
    #[error("no whole answer within the time limit")]
    Timeout,
    #[error("the answer is longer than {0} bytes")]
    TooLarge(u64),
    #[error("the answer could not be read: {0}")]
    BadResponse(String),
    /// The proxy answered instead of the origin.
    #[error("{reason}")]
    Proxy { kind: &'static str, reason: String, message: Option<String>, decision_id: String },
}

impl Failure {
    fn to_json(&self) -> Value {
        let kind = match self {
            Self::InvalidJob(_) => "invalid_job",
            Self::ProxyUnreachable(_) => "proxy_unreachable",
            Self::Timeout => "timeout",
            Self::TooLarge(_) => "response_too_large",
            Self::BadResponse(_) => "bad_response",
            Self::Proxy { kind, .. } => kind,
        };
        let mut error = Map::new();
        error.insert("kind".to_owned(), json!(kind));
        error.insert("reason".to_owned(), json!(self.to_string()));
        if let Self::Proxy { message, decision_id, .. } = self {
            error.insert("decision_id".to_owned(), json!(decision_id));
            if let Some(message) = message {
                error.insert("message".to_owned(), json!(message));
            }
        }
        json!({"ok": false, "error": error})
    }
}

impl From<Malformed> for Failure {
    fn from(error: Malformed) -> Self {
        Self::BadResponse(error.to_string())
    }
}

/// The whole worker: job on stdin, answer on stdout. The exit code is 0 when there is an answer to read, a failure
/// included, 2 when there was no job to understand, and 1 when the answer could not be written.
pub fn main() -> ExitCode {
    let mut input = Vec::new();
    if io::stdin().lock().read_to_end(&mut input).is_err() {
        return ExitCode::from(2);
    }
    let (answer, code) = answer(&input);
    let mut stdout = io::stdout().lock();
    let written = serde_json::to_writer(&mut stdout, &answer).is_ok() && stdout.flush().is_ok();
    if written { ExitCode::from(code) } else { ExitCode::FAILURE }
}

/// The answer to one job, and the exit code that goes with it.
pub(crate) fn answer(input: &[u8]) -> (Value, u8) {
    let outcome = serde_json::from_slice(input)
        .map_err(|error| Failure::InvalidJob(error.to_string()))
        .and_then(|job: Job| perform(&job));
    match outcome {
        Ok(data) => (json!({"ok": true, "data": data}), 0),
        Err(failure @ Failure::InvalidJob(_)) => (failure.to_json(), 2),
        Err(failure) => (failure.to_json(), 0),
    }
}

fn perform(job: &Job) -> Result<Value, Failure> {
    let (url, head) = request_head(job)?;
    let mut connection = Connection::open(job.proxy, Duration::from_millis(job.timeout_ms))?;
    let body = job.body.as_deref().unwrap_or_default();
    // The proxy may answer before it has read everything; then what it said is still there to be read.
    let sent = connection.send(head.as_bytes()).and_then(|()| connection.send(body.as_bytes()));
    let (response, body) = match (sent, connection.receive(&job.method, job.max_response_bytes)) {
        (_, Ok(received)) => received,
        (Err(error), Err(Failure::BadResponse(_))) => return Err(broken(&error)),
        (_, Err(failure)) => return Err(failure),
    };
    if let Some(decision_id) = response.fields.all(DECISION_ID).next() {
        return Err(proxy_answer(&body, &text(decision_id)));
    }
    let mut data = Map::new();
    data.insert("status_code".to_owned(), json!(response.status));
    data.insert("headers".to_owned(), Value::Object(headers(&response.fields)));
    match String::from_utf8(body) {
        Ok(text) => data.insert("body".to_owned(), json!(text)),
        Err(bytes) => {
            data.insert("body_encoding".to_owned(), json!("base64"));
            data.insert("body".to_owned(), json!(STANDARD.encode(bytes.as_bytes())))
        }
    };
    data.insert("url".to_owned(), json!(url));
    Ok(Value::Object(data))
}

/// The URL as it is asked for, and the head that asks for it.
fn request_head(job: &Job) -> Result<(String, String), Failure> {
    let invalid = |why: String| Failure::InvalidJob(why);
    let mut url = url::Url::parse(&job.url).map_err(|error| invalid(format!("url: {error}")))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(invalid("url: the scheme must be http or https".to_owned()));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(invalid("url: credentials do not belong into a URL".to_owned()));
    }
    url.set_fragment(None);
    let host = url.host_str().unwrap_or_default();
    let authority = url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"));
    if !is_token(job.method.as_bytes()) || matches!(job.method.as_str(), "CONNECT" | "TRACE") {
        return Err(invalid("method: not one that can be asked for".to_owned()));
    }

    let mut head = format!("{} {url} HTTP/1.1\r\nHost: {authority}\r\n", job.method);
    let has = |wanted: &str| job.headers.keys().any(|name| name.eq_ignore_ascii_case(wanted));
    for (name, value) in &job.headers {
        if !is_token(name.as_bytes()) || !is_field_content(value.as_bytes()) {
            return Err(invalid(format!("headers: {name:?} cannot be sent")));
        }
        if OURS.iter().any(|ours| name.eq_ignore_ascii_case(ours)) {
            return Err(invalid(format!("headers: {name:?} is not for a caller to set")));
        }
        head.push_str(&format!("{name}: {}\r\n", value.trim()));
    }
    if !has("user-agent") {
        head.push_str(concat!("User-Agent: latchgate/", env!("CARGO_PKG_VERSION"), "\r\n"));
    }
    if !has("accept") {
        head.push_str("Accept: */*\r\n");
    }
    match &job.body {
        Some(body) => head.push_str(&format!("Content-Length: {}\r\n", body.len())),
        // Servers want a length with these even when it is 0 (RFC 9110 §8.6).
        None if matches!(job.method.as_str(), "POST" | "PUT" | "PATCH") => head.push_str("Content-Length: 0\r\n"),
        None => {}
    }
    head.push_str("Connection: close\r\n\r\n");
    Ok((url.into(), head))
}

/// The connection to the proxy, with one deadline for all of it.
struct Connection {
    stream: TcpStream,
    deadline: Instant,
}

impl Connection {
    #[allow(clippy::disallowed_methods, reason = "no tokio in the worker, and its time is never paused")]
    fn open(proxy: SocketAddr, limit: Duration) -> Result<Self, Failure> {
        let deadline = Instant::now() + limit;
        let stream = TcpStream::connect_timeout(&proxy, limit.max(Duration::from_millis(1)))
            .map_err(|error| if is_timeout(&error) { Failure::Timeout } else { Failure::ProxyUnreachable(error) })?;
        let _ = stream.set_nodelay(true);
        Ok(Self { stream, deadline })
    }

    #[allow(clippy::disallowed_methods, reason = "no tokio in the worker, and its time is never paused")]
    fn left(&self) -> io::Result<Option<Duration>> {
        match self.deadline.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(Some(left)),
            _ => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn send(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.set_write_timeout(self.left()?)?;
            match self.stream.write(bytes)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => bytes = bytes.get(written..).unwrap_or_default(),
            }
        }
        Ok(())
    }

    /// Appends what comes next; 0 at the end of the stream.
    fn read(&mut self, out: &mut Vec<u8>) -> Result<usize, Failure> {
        let mut buffer = [0; READ_BYTES];
        let read = self
            .left()
            .and_then(|left| self.stream.set_read_timeout(left))
            .and_then(|()| self.stream.read(&mut buffer))
            .map_err(|error| broken(&error))?;
        out.extend_from_slice(buffer.get(..read).unwrap_or_default());
        Ok(read)
    }

    fn receive(&mut self, method: &str, max_bytes: u64) -> Result<(ResponseHead, Vec<u8>), Failure> {
        let ended = || Failure::BadResponse("the connection ended in the middle of it".to_owned());
        let mut pending = Vec::new();
        let length = loop {
            let scanned = pending.len();
            if self.read(&mut pending)? == 0 {
                return Err(ended());
            }
            if let Some(length) = end_of_head(&pending, scanned)? {
                break length;
            }
            if pending.len() > MAX_HEAD_BYTES {
                return Err(Malformed("the head is too long").into());
            }
        };
        let response = ResponseHead::parse(pending.get(..length).unwrap_or_default())?;
        pending.drain(..length);
        let framing = response.framing(method)?;
        let fits = |bytes: u64| if bytes > max_bytes { Err(Failure::TooLarge(max_bytes)) } else { Ok(()) };
        if let Framing::Length(bytes) = framing {
            fits(bytes)?;
        }

        let mut body = Vec::new();
        let mut decoder = Decoder::default();
        loop {
            match framing {
                Framing::None => return Ok((response, body)),
                Framing::Length(_) | Framing::UntilClose => body.append(&mut pending),
                Framing::Chunked => {
                    let mut rest = pending.as_slice();
                    while !rest.is_empty() && !decoder.is_done() {
                        let step = decoder.step(rest)?;
                        body.extend_from_slice(rest.get(step.data).unwrap_or_default());
                        rest = rest.get(step.consumed..).unwrap_or_default();
                    }
                    pending.clear();
                }
            }
            if let Framing::Length(bytes) = framing
                && body.len() as u64 >= bytes
            {
                body.truncate(usize::try_from(bytes).unwrap_or(usize::MAX));
                return Ok((response, body));
            }
            fits(body.len() as u64)?;
            if decoder.is_done() {
                return Ok((response, body));
            }
            if self.read(&mut pending)? == 0 {
                return if framing == Framing::UntilClose { Ok((response, body)) } else { Err(ended()) };
            }
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn broken(error: &io::Error) -> Failure {
    if is_timeout(error) { Failure::Timeout } else { Failure::BadResponse(error.to_string()) }
}

/// What the proxy said in the origin's place.
fn proxy_answer(body: &[u8], decision_id: &str) -> Failure {
    let said: Value = serde_json::from_slice(body).unwrap_or_default();
    let field = |name: &str| said.get(name).and_then(Value::as_str).map(str::to_owned);
    let (kind, reason, message) = match field("error").as_deref() {
        Some("egress_denied") => ("egress_denied", field("deny_reason"), None),
        Some("upstream_failed") => ("upstream_failed", field("reason"), field("message")),
        _ => ("proxy_refused", field("message"), None),
    };
    let reason = reason.unwrap_or_else(|| "the proxy refused and did not say why".to_owned());
    Failure::Proxy { kind, reason, message, decision_id: decision_id.to_owned() }
}

fn headers(fields: &Fields) -> Map<String, Value> {
    let mut joined: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in fields.iter() {
        let name = name.to_ascii_lowercase();
        // These were about the way from the proxy to here.
        if matches!(name.as_str(), "connection" | "transfer-encoding") {
            continue;
        }
        let between = if name == "set-cookie" { "\n" } else { ", " };
        let value = text(value);
        joined.entry(name).and_modify(|all| *all = format!("{all}{between}{value}")).or_insert(value);
    }
    joined.into_iter().map(|(name, value)| (name, Value::String(value))).collect()
}

/// A field value as text; bytes that are not UTF-8 are taken as ISO-8859-1, which loses none (RFC 9110 §5.5).
fn text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().map(|&byte| char::from(byte)).collect(),
    }
}

#[cfg(test)]
mod tests;
