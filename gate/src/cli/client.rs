//! The command line's side of the operator socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;

use super::{Failure, up};
use crate::auth::operator_key::OperatorKeyFile;
use crate::config::Config;
use crate::time::Timestamp;

const BASE: &str = "http://latchgate-operator";
const PATIENCE: Duration = Duration::from_secs(30);

/// Where the operator socket and key are.
#[derive(Debug, Args)]
pub(crate) struct OperatorArguments {
    /// The operator socket; where `latchgate up` of this user puts it when not given.
    #[arg(long, env = "LATCHGATE_OPERATOR_SOCKET", value_name = "SOCKET")]
    socket: Option<PathBuf>,
    /// The operator key file; the one that `latchgate up` of this user makes when not given.
    #[arg(long, env = "LATCHGATE_OPERATOR_KEY", value_name = "FILE")]
    key: Option<PathBuf>,
}

/// The state directory of `latchgate up` for the calling user.
pub(super) fn default_state_dir() -> PathBuf {
    match rustix::process::geteuid().as_raw() {
        0 => Config::default().state_dir,
        uid => up::user_state_dir(uid),
    }
}

impl OperatorArguments {
    /// `GET path`, with a proof.
    pub(crate) fn get(&self, path: &str) -> Result<Value, Failure> {
        self.call(Method::GET, path, Bytes::new())
    }

    /// `POST path` of a JSON body, with a proof.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.call(Method::POST, path, body.to_string().into())
    }

    fn found(&self) -> Result<(PathBuf, OperatorKeyFile), Failure> {
        let socket =
            self.socket.clone().unwrap_or_else(|| up::default_operator_socket(rustix::process::geteuid().as_raw()));
        let key_path = self.key.clone().unwrap_or_else(|| up::operator_key_path(&default_state_dir()));
        Ok((socket, OperatorKeyFile::load(&key_path).map_err(Failure::new)?))
    }

    /// `POST path` of a JSON body that asks for another protocol: the connection, once the gate has switched to it.
    pub(crate) async fn upgrade(&self, path: &str, body: &Value, protocol: &str) -> Result<TokioIo<Upgraded>, Failure> {
        let (socket, key) = self.found()?;
        let failed = |error: &dyn std::fmt::Display| Failure::new(format!("{}: {error}", socket.display()));
        let asked = async {
            let (answer, connection) =
                send(&socket, &key, Method::POST, path, body.to_string().into(), Some(protocol)).await?;
            if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
                let status = answer.status();
                let body = answer.into_body().collect().await.map_err(|error| failed(&error))?.to_bytes();
                connection.abort();
                return Err(refusal(status, &serde_json::from_slice(&body).map_err(|error| failed(&error))?));
            }
            hyper::upgrade::on(answer).await.map(TokioIo::new).map_err(|error| failed(&error))
        };
        tokio::time::timeout(PATIENCE, asked)
            .await
            .map_err(|_| Failure::new(format!("{}: no answer in {} s", socket.display(), PATIENCE.as_secs())))?
    }

    fn call(&self, method: Method, path: &str, body: Bytes) -> Result<Value, Failure> {
        let (socket, key) = self.found()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Failure::new)?;
        runtime.block_on(async {
            tokio::time::timeout(PATIENCE, call(&socket, &key, method, path, body))
                .await
                .map_err(|_| Failure::new(format!("{}: no answer in {} s", socket.display(), PATIENCE.as_secs())))?
        })
    }
}

/// Sends one request on a connection of its own, which a task carries.
async fn send(
    socket: &Path,
    key: &OperatorKeyFile,
    method: Method,
    path: &str,
    body: Bytes,
    protocol: Option<&str>,
) -> Result<(Response<Incoming>, tokio::task::JoinHandle<()>), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(format!("{}: {error}", socket.display()));
    let stream = tokio::net::UnixStream::connect(socket).await.map_err(|error| failed(&error))?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|error| failed(&error))?;
    let connection = tokio::spawn(async move {
        // What fails is told to whoever waits for the answer.
        let _ = connection.with_upgrades().await;
    });
    // RFC 9449 §4.2: `htu` is without query and fragment.
    let url = format!("{BASE}{}", path.split('?').next().unwrap_or(path));
    let (authorization, proof) = key.headers(method.as_str(), &url, Timestamp::now());
    let mut request = Request::builder().method(method).uri(path);
    if !body.is_empty() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    if let Some(protocol) = protocol {
        request = request.header(header::CONNECTION, "upgrade").header(header::UPGRADE, protocol);
    }
    let request = request
        .header(header::HOST, "latchgate-operator")
        .header(header::AUTHORIZATION, authorization.as_str())
        .header("dpop", proof)
        .body(Full::new(body))
        .map_err(|error| failed(&error))?;
    let answer = sender.send_request(request).await.map_err(|error| failed(&error))?;
    Ok((answer, connection))
}

async fn call(socket: &Path, key: &OperatorKeyFile, method: Method, path: &str, body: Bytes) -> Result<Value, Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(format!("{}: {error}", socket.display()));
    let (answer, connection) = send(socket, key, method, path, body, None).await?;
    let status = answer.status();
    let body = answer.into_body().collect().await.map_err(|error| failed(&error))?.to_bytes();
    connection.abort();
    let value: Value = serde_json::from_slice(&body).map_err(|error| failed(&error))?;
    if status.is_success() {
        return Ok(value);
    }
    Err(refusal(status, &value))
}

fn refusal(status: StatusCode, value: &Value) -> Failure {
    let text = |name: &str| value.get(name).and_then(Value::as_str).unwrap_or_default();
    let why = ["deny_reason", "message"].map(text).join("");
    Failure::new(format!("{status}: {} {why} (decision {})", text("error"), text("decision_id")))
}
