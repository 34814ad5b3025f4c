use proptest::prelude::*;
use serde_json::json;

use super::*;

fn template(url: &str) -> Template {
    Template::parse("GET", url, &BTreeMap::new(), None).unwrap()
}

fn full(method: &str, url: &str, headers: Value, body: Value) -> Template {
    let headers: BTreeMap<String, String> = serde_json::from_value(headers).unwrap();
    Template::parse(method, url, &headers, (!body.is_null()).then_some(&body)).unwrap()
}

fn params(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn url_of(template_url: &str, value: Value) -> Result<String, TemplateError> {
    render(&template(template_url), &params(value)).map(|call| call.url)
}

#[test]
fn a_value_is_encoded_for_its_place() {
    for (url, value, rendered) in [
        ("https://h.example/u/{{a}}/x", json!("x y/z?q#f&%"), "https://h.example/u/x%20y%2Fz%3Fq%23f%26%25/x"),
        ("https://h.example/u/{{a}}", json!("ü"), "https://h.example/u/%C3%BC"),
        ("https://h.example/u/{{a}}", json!(7), "https://h.example/u/7"),
        ("https://h.example/u/{{a}}", json!(true), "https://h.example/u/true"),
        ("https://h.example/s?q={{a}}&n=1", json!("a&n=2#x y+"), "https://h.example/s?q=a%26n%3D2%23x%20y%2B&n=1"),
        ("https://h.example/s?q={{a}}", json!(""), "https://h.example/s?q="),
        ("https://h.example/{{a}}", json!("repos/a/b c?x"), "https://h.example/repos/a/b%20c%3Fx"),
        ("https://h.example/{{a}}", json!("/repos/a"), "https://h.example/repos/a"),
        ("https://h.example/v1/{{+a}}", json!("x/y z/w"), "https://h.example/v1/x/y%20z/w"),
        ("https://h.example/v1/{{+a}}", json!("x/"), "https://h.example/v1/x/"),
        ("https://{{a}}.example.com/", json!("EN"), "https://en.example.com/"),
        ("https://h.example:{{a}}/x", json!(8443), "https://h.example:8443/x"),
        ("{{a}}/rest/x", json!("https://h.example/base/"), "https://h.example/base/rest/x"),
        ("{{ a }}", json!("https://H.example/x?y=1#frag"), "https://h.example/x?y=1"),
        ("{{a}}", json!("http://h.example"), "http://h.example/"),
        // Placeholders in a value are text.
        ("https://h.example/u/{{a}}", json!("{{b}}"), "https://h.example/u/%7B%7Bb%7D%7D"),
    ] {
        assert_eq!(url_of(url, json!({"a": value})).as_deref(), Ok(rendered), "{url} {value}");
    }
}

#[test]
fn what_would_change_the_structure_of_the_url_is_refused() {
    for (url, value) in [
        // Path: segments that the URL parser, or a server that decodes first, would fold away.
        ("https://h.example/u/{{a}}/x", json!("..")),
        ("https://h.example/u/{{a}}/x", json!(".")),
        ("https://h.example/u/{{a}}/x", json!("%2e%2E")),
        ("https://h.example/u/{{a}}/x", json!("a/../../admin")),
        ("https://h.example/u/{{a}}/x", json!("..\\admin")),
        ("https://h.example/u/{{a}}", json!("")),
        ("https://h.example/u/.{{a}}", json!(".")),
        ("https://h.example/v1/{{+a}}", json!("../admin")),
        ("https://h.example/v1/{{+a}}", json!("x/../../admin")),
        ("https://h.example/v1/{{+a}}", json!("x//y")),
        ("https://h.example/v1/{{+a}}", json!("x/%2e%2e/y")),
        ("https://h.example/v1/{{+a}}", json!("x\\..\\y")),
        ("https://h.example/{{a}}", json!("x/..")),
        // Host.
        ("https://{{a}}.example.com/", json!("evil.net/")),
        ("https://{{a}}.example.com/", json!("evil.net#")),
        ("https://{{a}}.example.com/", json!("evil.net?")),
        ("https://{{a}}.example.com/", json!("user@evil.net")),
        ("https://{{a}}.example.com/", json!("evil.net:80")),
        ("https://{{a}}.example.com/", json!("evil.net\\")),
        ("https://{{a}}.example.com/", json!("evil.net%2f")),
        ("https://{{a}}.example.com/", json!("")),
        ("https://{{a}}.example.com/", json!(".")),
        ("https://{{a}}.example.com/", json!("a..b")),
        ("https://api.{{a}}", json!("evil.net/x")),
        ("https://api.{{a}}/", json!("evil.net.")),
        ("https://h.example:{{a}}/x", json!("80@evil.net")),
        ("https://h.example:{{a}}/x", json!("99999")),
        ("https://h.example:{{a}}/x", json!("-1")),
        // A whole URL.
        ("{{a}}", json!("/relative")),
        ("{{a}}", json!("//h.example/")),
        ("{{a}}", json!("ftp://h.example/")),
        ("{{a}}", json!("file:///etc/passwd")),
        ("{{a}}", json!("javascript:alert(1)")),
        ("{{a}}", json!("https:h.example")),
        ("{{a}}", json!("https:///h.example")),
        ("{{a}}", json!("https:\\\\h.example\\")),
        ("{{a}}", json!("https://h.example\\@evil.net/")),
        ("{{a}}", json!("https://user@h.example/")),
        ("{{a}}", json!("https://user:pw@h.example/")),
        ("{{a}}", json!("https://@h.example/")),
        ("{{a}}", json!(" https://h.example/")),
        ("{{a}}", json!("https://h.exa\tmple/")),
        ("{{a}}", json!("https://h.example/\r\nX: y")),
        ("{{a}}", json!("https://h.example./")),
        ("{{a}}", json!("https://h..example/")),
        ("{{a}}", json!("https://h.example:99999/")),
        ("{{a}}", json!("https://")),
        ("{{a}}", json!("")),
        ("{{a}}", json!(7)),
        ("{{a}}", json!(null)),
        ("{{a}}/x", json!("https://h.example/?q=")),
        ("{{a}}/x", json!("https://h.example/#")),
        // Not scalars.
        ("https://h.example/u/{{a}}", json!(["x"])),
        ("https://h.example/u/{{a}}", json!({"x": 1})),
        ("https://h.example/u/{{a}}", json!(null)),
    ] {
        let rendered = url_of(url, json!({ "a": value }));
        assert!(rendered.is_err(), "{url} with {value}: {rendered:?}");
    }
    assert_eq!(url_of("https://h.example/{{b}}/", json!({})), Err(TemplateError::Missing { param: "b".into() }));
}

#[test]
fn the_target_is_that_of_the_finished_url() {
    for (url, host, port) in [
        ("https://H.Example/x", "h.example", 443),
        ("http://h.example", "h.example", 80),
        ("HTTPS://h.example:8443/", "h.example", 8443),
        ("https://bücher.example/", "xn--bcher-kva.example", 443),
        ("https://h%2eexample/", "h.example", 443),
        ("http://0x7f.1/", "127.0.0.1", 80),
        ("http://2130706433:81/", "127.0.0.1", 81),
        ("http://[::ffff:127.0.0.1]/", "::ffff:127.0.0.1", 80),
    ] {
        let call = render(&template("{{u}}"), &params(json!({ "u": url }))).unwrap();
        assert_eq!((call.host.as_str(), call.port), (host, port), "{url}");
        let again = ::url::Url::parse(&call.url).unwrap();
        assert_eq!(again.port_or_known_default(), Some(port));
        assert_eq!(again.host_str().unwrap().trim_matches(['[', ']']).contains(':'), host.contains(':'));
    }
}

#[test]
fn headers_hold_one_line() {
    let given = full("GET", "https://h.example/", json!({"X-One": "v {{a}}", "X-Two": "{{b}}"}), json!(null));
    let call = render(&given, &params(json!({"a": "x", "b": "y"}))).unwrap();
    assert_eq!(call.headers, BTreeMap::from([("x-one".into(), "v x".into()), ("x-two".into(), "y".into())]));
    // A header that is one param goes with it; one with text around it needs it.
    assert_eq!(render(&given, &params(json!({"a": "x"}))).unwrap().headers.len(), 1);
    assert_eq!(render(&given, &params(json!({"b": "x"}))), Err(TemplateError::Missing { param: "a".into() }));
    for value in ["x\r\nHost: evil", "x\ny", "x\ry", "x\0y", "x\u{7f}", "\u{85}", "é"] {
        let error = render(&given, &params(json!({"a": value, "b": "y"}))).unwrap_err();
        assert_eq!(error, TemplateError::HeaderValue { header: "x-one".into() }, "{value:?}");
        assert!(!error.to_string().contains("evil"));
    }
}

#[test]
fn bodies_hold_values_as_data() {
    let body_of = |body: Value, headers: Value, value: Value| {
        render(&full("POST", "https://h.example/", headers, body), &params(value)).unwrap()
    };
    let evil = json!({"t": "\", \"admin\": true, \"x\": \"\\", "n": 5, "o": {"k": [1]}});
    let call = body_of(
        json!({"title": "{{t}}", "n": "{{n}}", "o": "{{o}}", "s": "n={{n}}", "gone": "{{z}}"}),
        json!({}),
        evil.clone(),
    );
    assert_eq!(
        serde_json::from_str::<Value>(call.body.as_deref().unwrap()).unwrap(),
        json!({"title": evil["t"], "n": 5, "o": {"k": [1]}, "s": "n=5"})
    );
    assert_eq!(call.headers["content-type"], "application/json");
    // The same in a template that is text: in a string of it, and outside.
    let call = body_of(json!(r#"{"title": "<{{t}}>", "n": {{n}}, "t": {{t}}}"#), json!({}), evil.clone());
    assert_eq!(
        serde_json::from_str::<Value>(call.body.as_deref().unwrap()).unwrap(),
        json!({"title": format!("<{}>", evil["t"].as_str().unwrap()), "n": 5, "t": evil["t"]})
    );
    let form = json!({"Content-Type": "application/x-www-form-urlencoded"});
    let call = body_of(json!("a={{t}}&b=1"), form, json!({"t": "x&b=2"}));
    assert_eq!(call.body.as_deref(), Some("a=x%26b%3D2&b=1"));
    // One param and nothing else: the caller's own body.
    assert_eq!(body_of(json!("{{t}}"), json!({}), json!({"t": "raw {{n}}"})).body.as_deref(), Some("raw {{n}}"));
    assert_eq!(body_of(json!("{{t}}"), json!({}), json!({"t": {"a": 1}})).body.as_deref(), Some(r#"{"a":1}"#));
    assert_eq!(body_of(json!("{{t}}"), json!({}), json!({})).body, None);
}

#[test]
fn a_call_can_be_made_of_the_params_themselves() {
    let call = |value: Value| render(&Template::FromParams, &params(value));
    let made = call(json!({"method": "PUT", "url": "https://h.example/x", "headers": {"X-A": "1"}, "body": {"a": 1}}))
        .unwrap();
    assert_eq!((made.method.as_str(), made.body.as_deref()), ("PUT", Some(r#"{"a":1}"#)));
    assert_eq!(made.headers["x-a"], "1");
    assert_eq!(call(json!({"url": "https://h.example/"})).unwrap().method, "GET");
    for value in [
        json!({}),
        json!({"url": "https://h.example/", "method": "get"}),
        json!({"url": "https://h.example/", "method": "CONNECT"}),
        json!({"url": "https://h.example/", "method": "GET / HTTP/1.1\r\nHost: evil"}),
        json!({"url": "https://h.example/", "method": 1}),
        json!({"url": "https://h.example/", "headers": []}),
        json!({"url": "https://h.example/", "headers": {"Host": "evil"}}),
        json!({"url": "https://h.example/", "headers": {"transfer-encoding": "chunked"}}),
        json!({"url": "https://h.example/", "headers": {"Content-Length": "0"}}),
        json!({"url": "https://h.example/", "headers": {"proxy-authorization": "x"}}),
        json!({"url": "https://h.example/", "headers": {"x y": "1"}}),
        json!({"url": "https://h.example/", "headers": {"": "1"}}),
        json!({"url": "https://h.example/", "headers": {"x": "1\r\ny: 2"}}),
        json!({"url": "https://h.example/", "headers": {"x": 1}}),
        json!({"url": "https://h.example/", "headers": {"x": "1", "X": "2"}}),
    ] {
        assert!(call(value.clone()).is_err(), "{value}");
    }
}

#[test]
fn templates_that_cannot_be_used_are_refused() {
    for url in [
        "",
        "h.example/x",
        "ftp://h.example/",
        "https:///x",
        "https://",
        "https://?q={{a}}",
        "https://user@h.example/",
        "https://{{a}}@h.example/",
        "https://h.example/{{a",
        "https://h.example/{{}}",
        "https://h.example/{{a b}}",
        "https://h.example/#{{a}}",
        "{{a}}.example.com/",
        "{{a}}{{b}}",
        "https://h.example\\{{a}}/",
        "https://:{{a}}/",
        "https://a..b/{{a}}",
        "https://h.example:x/",
        "https://h.example./{{a}}",
        "https://h.example/../{{a}}",
        "https://h ost/",
    ] {
        let usable = Template::parse("GET", url, &BTreeMap::new(), None).is_ok();
        assert!(!usable, "{url}");
    }
    let with = |method: &str, name: &str, value: &str| {
        let headers = BTreeMap::from([(name.to_owned(), value.to_owned())]);
        Template::parse(method, "https://h.example/", &headers, None)
    };
    assert!(with("get", "X-A", "1").is_ok());
    for (method, name, value) in [
        ("CONNECT", "x", "1"),
        ("TRACE", "x", "1"),
        ("GET\r\n", "x", "1"),
        ("GET", "Host", "h"),
        ("GET", "x y", "1"),
        ("GET", "Content-Length", "{{a}}"),
        ("GET", "x", "a\r\nb"),
        ("GET", "x", "{{a"),
        ("GET", "x:", "1"),
    ] {
        assert!(with(method, name, value).is_err(), "{method} {name} {value}");
    }
    let twice = BTreeMap::from([("X-A".to_owned(), "1".to_owned()), ("x-a".to_owned(), "2".to_owned())]);
    assert!(Template::parse("GET", "https://h.example/", &twice, None).is_err());
}

proptest! {
    /// Whatever a value is, what the template says around it stays: the host, the path's own segments, the query's own
    /// members.
    #[test]
    fn no_value_moves_a_call(path in any::<String>(), query in any::<String>()) {
        let t = template("https://api.example.com/v1/users/{{p}}/keys?fixed=1&q={{q}}&last=2");
        if let Ok(call) = render(&t, &params(json!({"p": path, "q": query}))) {
            let url = ::url::Url::parse(&call.url).unwrap();
            prop_assert_eq!((call.host.as_str(), call.port), ("api.example.com", 443));
            prop_assert_eq!(url.host_str(), Some("api.example.com"));
            let segments: Vec<&str> = url.path_segments().unwrap().collect();
            prop_assert_eq!(segments.len(), 4);
            prop_assert_eq!((segments[0], segments[1], segments[3]), ("v1", "users", "keys"));
            let members: Vec<(String, String)> = url.query_pairs().into_owned().collect();
            prop_assert_eq!(members.len(), 3);
            prop_assert_eq!(&members[1].1, &query);
            prop_assert!(url.fragment().is_none() && url.username().is_empty());
        }
    }

    #[test]
    fn no_value_leaves_the_prefix_of_its_path(value in "[a./%2eE\\\\?#@: -]{0,12}") {
        if let Ok(call) = render(&template("https://api.example.com/v1/{{+p}}"), &params(json!({"p": value}))) {
            prop_assert!(call.url.starts_with("https://api.example.com/v1/"), "{}", call.url);
        }
    }

    #[test]
    fn no_value_leaves_the_suffix_of_its_host(value in "[a-z./%2e\\\\?#@:*-]{0,12}") {
        if let Ok(call) = render(&template("https://{{h}}.wiki.example/x"), &params(json!({"h": value}))) {
            prop_assert!(call.host.ends_with(".wiki.example"), "{}", call.host);
            prop_assert!(call.url.ends_with(".wiki.example/x"), "{}", call.url);
        }
    }

    #[test]
    fn a_json_body_parses_to_what_was_given(value in any::<String>()) {
        let t = full("POST", "https://h.example/", json!({}), json!(r#"{"a": "{{v}}", "b": {{v}}, "c": 1}"#));
        let call = render(&t, &params(json!({"v": value}))).unwrap();
        let parsed: Value = serde_json::from_str(call.body.as_deref().unwrap()).unwrap();
        prop_assert_eq!(parsed, json!({"a": value, "b": value, "c": 1}));
    }

    #[test]
    fn a_whole_url_is_checked_as_it_is_sent(value in "(https?://)?[a-z0-9@:/?#.%\\\\\\[\\]-]{0,24}") {
        if let Ok(call) = render(&template("{{u}}"), &params(json!({"u": value}))) {
            let sent = ::url::Url::parse(&call.url).unwrap();
            prop_assert_eq!(sent.host_str().unwrap().trim_matches(['[', ']']), call.host.as_str());
            prop_assert_eq!(sent.port_or_known_default(), Some(call.port));
            prop_assert!(sent.username().is_empty() && sent.password().is_none());
        }
    }

    #[test]
    fn no_header_value_becomes_two(value in any::<String>()) {
        let t = full("GET", "https://h.example/", json!({"x": "{{v}}"}), json!(null));
        if let Ok(call) = render(&t, &params(json!({"v": value}))) {
            prop_assert!(call.headers.values().all(|v| !v.contains(['\r', '\n', '\0'])));
        }
    }
}
