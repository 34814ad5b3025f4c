//! An HTTP/1.1 client that sends exactly what it is told to.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

/// Where a gate listens.
#[derive(Clone, Debug)]
pub enum Target {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&self.body)))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// `status code`, as the contract's table has it.
    pub fn code(&self) -> String {
        format!("{} {}", self.status, self.json()["error"].as_str().unwrap_or("-"))
    }
}

/// A connection that stays open between requests.
pub struct Connection {
    stream: Box<dyn Stream>,
    buffered: Vec<u8>,
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

impl Connection {
    pub fn open(target: &Target) -> std::io::Result<Self> {
        // Executions of these suites may take minutes; a gate that hangs is still found out.
        let patience = Some(Duration::from_secs(600));
        let stream: Box<dyn Stream> = match target {
            Target::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(patience)?;
                Box::new(stream)
            }
            Target::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_read_timeout(patience)?;
                Box::new(stream)
            }
        };
        Ok(Self { stream, buffered: Vec::new() })
    }

    pub fn send(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes)
    }

    /// Sends one request and reads its answer.
    pub fn request(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&[u8]>,
    ) -> std::io::Result<Response> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if let Some(body) = body {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(body.unwrap_or_default());
        self.send(&bytes)?;
        self.response()
    }

    fn more(&mut self) -> std::io::Result<()> {
        let mut chunk = [0_u8; 16 << 10];
        let read = self.stream.read(&mut chunk)?;
        if read == 0 {
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the answer ended early"));
        }
        self.buffered.extend_from_slice(&chunk[..read]);
        Ok(())
    }

    pub fn response(&mut self) -> std::io::Result<Response> {
        let end = loop {
            if let Some(at) = self.buffered.windows(4).position(|window| window == b"\r\n\r\n") {
                break at;
            }
            self.more()?;
        };
        let head = String::from_utf8_lossy(&self.buffered[..end]).into_owned();
        let mut lines = head.split("\r\n");
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers: Vec<(String, String)> = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
            .collect();
        let length: usize = headers
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
            .map_or(0, |(_, value)| value.parse().unwrap());
        while self.buffered.len() < end + 4 + length {
            self.more()?;
        }
        let body = self.buffered[end + 4..end + 4 + length].to_vec();
        self.buffered.drain(..end + 4 + length);
        Ok(Response { status, headers, body })
    }
}

/// One request on a connection of its own.
pub fn once(target: &Target, method: &str, path: &str, headers: &[(&str, &str)], body: Option<&[u8]>) -> Response {
    Connection::open(target).unwrap().request(method, path, headers, body).unwrap()
}
