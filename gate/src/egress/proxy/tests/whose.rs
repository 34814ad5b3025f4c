use super::*;

#[tokio::test]
async fn without_a_record_of_the_kernel_nothing_is_served() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let mut flows = bench.proxy.flows();
    for (leaf, reason) in [(None, "unattributed"), (Some(LeafId(99)), "no_session")] {
        let mut stream = bench.dial_as(leaf).await;
        let client = stream.local_addr().unwrap();
        // What it claims about itself does not matter.
        let claim = format!(
            "CONNECT origin.test:{} HTTP/1.1\r\nProxy-Authorization: Basic eA==\r\nX-Execution: execution-7\r\n\r\n",
            origin.port
        );
        stream.write_all(claim.as_bytes()).await.unwrap();
        let answer = Answer::read(&mut stream).await;
        assert_eq!(answer.denied(), reason);
        let flow = flows.recv().await.unwrap();
        assert_eq!((flow.rule.as_str(), flow.verdict, flow.client), (reason, Verdict::Deny, Some(client)));
        assert_eq!((flow.execution_id.as_deref(), Some(flow.decision_id.as_str())), (None, answer.field(DECISION_ID)));
    }
    assert_eq!(origin.connections(), 0);
    assert!(session.close().await.is_empty());
}

#[tokio::test]
async fn strangers_in_numbers_do_not_keep_others_out() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let _session = bench.open(&[("origin.test", origin.port)]);
    let mut strangers = Vec::new();
    for _ in 0..200 {
        strangers.push(bench.dial_as(None).await);
    }
    assert_eq!(bench.connect(&format!("origin.test:{}", origin.port)).await.1.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn executions_beside_each_other_have_their_own_profiles_and_records() {
    let bench = Arc::new(Bench::plain().await);
    let (one, two) = (Origin::echoing().await, Origin::echoing().await);
    let leaves: Vec<LeafId> = (100..108).map(LeafId).collect();
    let port_of = |leaf: LeafId| if leaf.0.is_multiple_of(2) { one.port } else { two.port };
    let sessions: Vec<_> =
        leaves.iter().map(|&leaf| bench.open_leaf(leaf, &[("origin.test", port_of(leaf))])).collect();
    let mut tasks = Vec::new();
    for &leaf in &leaves {
        let bench = Arc::clone(&bench);
        let ports = [one.port, two.port];
        let own = port_of(leaf);
        tasks.push(tokio::spawn(async move {
            for round in 0..40 {
                let port = ports[round % 2];
                let mut stream = bench.dial_as(Some(leaf)).await;
                stream.write_all(format!("CONNECT origin.test:{port} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
                let head = read_head(&mut stream).await;
                assert_eq!(Answer::parse(&head).status, if port == own { 200 } else { 403 });
            }
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    for (session, leaf) in sessions.into_iter().zip(leaves) {
        let records = session.close().await;
        assert_eq!(records.len(), 40);
        let id = format!("execution-{}", leaf.0);
        assert!(records.iter().all(|flow| flow.execution_id.as_deref() == Some(&id)));
        assert_eq!(records.iter().filter(|flow| flow.verdict == Verdict::Allow).count(), 20);
    }
}

#[tokio::test]
async fn the_end_of_an_execution_cuts_and_notes_what_is_open() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let quiet = Origin::doing(|stream, _| async move {
        tokio::time::sleep(Duration::from_secs(60)).await;
        drop(stream);
    })
    .await;
    let session = bench.open_bytes(&[("origin.test", origin.port), ("origin.test", quiet.port)]);
    let (mut tunnel, _) = bench.connect(&format!("origin.test:{}", origin.port)).await;
    tunnel.write_all(b"abc").await.unwrap();
    exactly(&mut tunnel, 3).await;
    let mut waiting = bench.dial().await;
    let request = format!("GET http://origin.test:{0}/ HTTP/1.1\r\nHost: origin.test:{0}\r\n\r\n", quiet.port);
    waiting.write_all(request.as_bytes()).await.unwrap();
    let mut silent = bench.dial().await;
    while quiet.connections() == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let records = timeout(Duration::from_secs(2), session.close()).await.unwrap();
    assert_eq!(records.len(), 3);
    assert!(records.iter().all(|flow| flow.end == End::OpenAtClose), "{records:?}");
    let flow = records.iter().find(|flow| flow.protocol == Some(Protocol::Tcp)).unwrap();
    assert_eq!((flow.bytes_to_upstream, flow.bytes_from_upstream), (3, 3));
    for stream in [&mut tunnel, &mut waiting, &mut silent] {
        assert!(timeout(Duration::from_secs(2), stream.read_u8()).await.unwrap().is_err());
    }
    assert_eq!(bench.connect(&format!("origin.test:{}", origin.port)).await.1.denied(), "no_session");
}

#[tokio::test]
async fn a_session_that_is_dropped_is_closed_too() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let (mut tunnel, _) = bench.connect(&format!("origin.test:{}", origin.port)).await;
    drop(session);
    assert!(timeout(Duration::from_secs(2), tunnel.read_u8()).await.unwrap().is_err());
    // A new execution in a leaf of the same number is another one.
    let session = bench.open(&[("origin.test", 1)]);
    assert_eq!(bench.connect(&format!("origin.test:{}", origin.port)).await.1.denied(), "port_not_allowed");
    assert_eq!(session.close().await.len(), 1);
}

#[tokio::test]
async fn what_the_kernel_accepted_before_the_end_is_noted() {
    let bench = Bench::plain().await;
    let session = bench.open(&[]);
    // On this one thread the proxy cannot have run between these and the end; the second half come to a listener that
    // it never polls.
    let unpolled = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (polled, local) = (bench.proxy.addresses().v4.into(), unpolled.local_addr().unwrap());
    let clients: Vec<_> = (0..20).map(|n| blocking_dial(if n < 10 { polled } else { local })).collect();
    let mut ports: Vec<_> = clients.iter().map(|stream| stream.local_addr().unwrap().port()).collect();
    drop(clients);
    sweep(&bench.proxy.shared, &unpolled, None);
    let records = session.close().await;
    let mut noted: Vec<_> = records.iter().map(|flow| flow.client.unwrap().port()).collect();
    ports.sort_unstable();
    noted.sort_unstable();
    assert_eq!(noted, ports);
}

#[allow(clippy::disallowed_methods, reason = "it must not give the runtime a turn")]
fn blocking_dial(address: SocketAddr) -> std::net::TcpStream {
    std::net::TcpStream::connect(address).unwrap()
}

#[tokio::test]
async fn both_families_are_served_on_one_port() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let session = bench.open(&[("origin.test", origin.port)]);
    let Some(v6) = bench.proxy.addresses().v6 else { return };
    assert_eq!(v6.port(), bench.proxy.addresses().v4.port());
    let mut stream = TcpStream::connect(v6).await.unwrap();
    stream.write_all(format!("CONNECT origin.test:{} HTTP/1.1\r\n\r\n", origin.port).as_bytes()).await.unwrap();
    assert!(read_head(&mut stream).await.starts_with(b"HTTP/1.1 200"));
    assert_eq!(session.close().await.len(), 1);
}

#[tokio::test]
async fn a_namespaces_listener_and_the_kernels_record_must_agree() {
    let bench = Bench::plain().await;
    let origin = Origin::echoing().await;
    let listeners: Vec<_> = (0..2).map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let own: Vec<SocketAddr> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    let session = session(LEAF, entries(&[("origin.test", origin.port)], EntryProtocol::Tcp));
    let other = bench.open_leaf(LeafId(8), &[("origin.test", origin.port)]);
    let open = bench.proxy.open_with_listeners(LEAF, session, listeners).unwrap();
    for address in &own {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("CONNECT origin.test:{} HTTP/1.1\r\n\r\n", origin.port).as_bytes()).await.unwrap();
        assert!(read_head(&mut stream).await.starts_with(b"HTTP/1.1 200"));
    }
    for (leaf, reason) in [(Some(LeafId(8)), "listener_mismatch"), (None, "unattributed")] {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        bench.who.by_port.lock().unwrap().insert(socket.local_addr().unwrap().port(), leaf);
        let mut stream = socket.connect(own[0]).await.unwrap();
        stream.write_all(b"CONNECT origin.test:1 HTTP/1.1\r\n\r\n").await.unwrap();
        assert_eq!(Answer::read(&mut stream).await.denied(), reason);
    }
    // What is in the backlog at the end is noted, and then nobody listens any more.
    let late = blocking_dial(own[1]);
    let records = open.close().await;
    assert_eq!(records.len(), 3);
    assert!(records.iter().any(|flow| flow.client == Some(late.local_addr().unwrap())));
    while TcpStream::connect(own[0]).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(other.close().await.is_empty());
}
