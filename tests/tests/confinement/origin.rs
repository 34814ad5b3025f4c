//! An origin that can hold an answer back until the test lets it go.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// `/bytes/N` is answered with N bytes, `/held…` once [`Origin::release`] was called, everything else at once.
pub struct Origin {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    name: String,
    requests: Mutex<Vec<String>>,
    released: Mutex<bool>,
    changed: Condvar,
}

impl Origin {
    /// Answers with its name.
    pub fn start(address: &str, name: &str) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            requests: Mutex::default(),
            released: Mutex::new(false),
            changed: Condvar::new(),
        });
        let serving = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = Arc::clone(&serving);
                std::thread::spawn(move || answer(stream, &shared));
            }
        });
        Self { address, shared }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// The heads of the requests so far.
    pub fn requests(&self) -> Vec<String> {
        self.shared.requests.lock().unwrap().clone()
    }

    /// How many answers are held, or were.
    pub fn held(&self) -> usize {
        self.requests().iter().filter(|head| head.starts_with("GET /held")).count()
    }

    pub fn release(&self) {
        *self.shared.released.lock().unwrap() = true;
        self.shared.changed.notify_all();
    }
}

fn answer(stream: TcpStream, shared: &Shared) {
    let mut reader = BufReader::new(&stream);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
        head.push_str(&line);
    }
    shared.requests.lock().unwrap().push(head.clone());
    let mut body = vec![0; length];
    if reader.read_exact(&mut body).is_err() {
        return;
    }
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    if path.starts_with("/held") {
        let released = shared.released.lock().unwrap();
        let _ = shared.changed.wait_timeout_while(released, Duration::from_secs(30), |released| !*released);
    }
    let text = match path.strip_prefix("/bytes/") {
        Some(bytes) => "x".repeat(bytes.parse().unwrap()),
        None => shared.name.clone(),
    };
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", text.len());
    let _ = (&stream).write_all((head + &text).as_bytes());
}
