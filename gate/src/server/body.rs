//! Reading a request's body: its media type, its size, its time.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::{HeaderMap, header};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Why a body is not read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BodyError {
    #[error("the body must be application/json")]
    MediaType,
    #[error("the body is larger than {limit} bytes")]
    TooLarge { limit: usize },
    #[error("the body did not arrive in time")]
    Slow,
    #[error("the body ended early")]
    Broken,
    #[error("the bodies that this listener holds are as many bytes as it may")]
    NoRoom,
}

/// The bytes that the bodies of one listener may have together, whoever sends them.
#[derive(Clone, Debug)]
pub struct Room(Arc<Semaphore>);

impl Room {
    pub fn new(bytes: usize) -> Self {
        Self(Arc::new(Semaphore::new(bytes.min(Semaphore::MAX_PERMITS))))
    }
}

/// A body, and the room that it takes for as long as this lives.
#[derive(Debug, Default)]
pub struct Held {
    pub bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

/// Reads a JSON body as [`read`] does, in the room that is left.
///
/// # Errors
/// [`BodyError`]; `NoRoom` as soon as the bytes that have come find none, and what came is let go then.
pub async fn read_within(
    headers: &HeaderMap,
    body: Incoming,
    limit: usize,
    patience: Duration,
    room: &Room,
) -> Result<Held, BodyError> {
    check(headers, &body, limit)?;
    match tokio::time::timeout(patience, gather(body, limit, room)).await {
        Err(_) => Err(BodyError::Slow),
        Ok(gathered) => gathered,
    }
}

/// Room is taken for what has come, not for what was announced: an announcement costs nobody anything.
async fn gather<B>(mut body: B, limit: usize, room: &Room) -> Result<Held, BodyError>
where
    B: Body<Data = Bytes> + Unpin,
{
    let mut bytes = Vec::new();
    let mut taken: Option<OwnedSemaphorePermit> = None;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| BodyError::Broken)?.into_data() else { continue };
        if data.len() > limit - bytes.len() {
            return Err(BodyError::TooLarge { limit });
        }
        let wanted = u32::try_from(data.len()).map_err(|_| BodyError::NoRoom)?;
        let more = Arc::clone(&room.0).try_acquire_many_owned(wanted).map_err(|_| BodyError::NoRoom)?;
        match &mut taken {
            Some(taken) => taken.merge(more),
            none => *none = Some(more),
        }
        bytes.extend_from_slice(&data);
    }
    Ok(Held { bytes: bytes.into(), _room: taken })
}

/// Reads a JSON body of at most `limit` bytes. A body that is not empty must say that it is JSON, and in UTF-8 where it
/// names a charset (RFC 8259 §8.1).
pub async fn read(headers: &HeaderMap, body: Incoming, limit: usize, patience: Duration) -> Result<Bytes, BodyError> {
    check(headers, &body, limit)?;
    match tokio::time::timeout(patience, Limited::new(body, limit).collect()).await {
        Err(_) => Err(BodyError::Slow),
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(BodyError::TooLarge { limit }),
        Ok(Err(_)) => Err(BodyError::Broken),
    }
}

/// What the head says of a body.
fn check(headers: &HeaderMap, body: &Incoming, limit: usize) -> Result<(), BodyError> {
    if !body.is_end_stream() && !is_json(headers) {
        return Err(BodyError::MediaType);
    }
    if body.size_hint().lower() > limit as u64 {
        return Err(BodyError::TooLarge { limit });
    }
    Ok(())
}

fn is_json(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(header::CONTENT_TYPE).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return false };
    let Ok(value) = value.to_str() else { return false };
    let mut parts = value.split(';').map(str::trim);
    let essence = parts.next().unwrap_or_default();
    let encoded = headers.get(header::CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity");
    !encoded
        && essence.eq_ignore_ascii_case("application/json")
        && parts.filter(|part| !part.is_empty()).all(|part| match part.split_once('=') {
            Some((name, value)) if name.eq_ignore_ascii_case("charset") => {
                value.trim_matches('"').eq_ignore_ascii_case("utf-8")
            }
            _ => true,
        })
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use super::*;

    /// So many pieces of so many bytes.
    struct Coming(usize, usize);

    impl Body for Coming {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, Self::Error>>> {
            let Some(left) = self.0.checked_sub(1) else { return Poll::Ready(None) };
            self.0 = left;
            Poll::Ready(Some(Ok(hyper::body::Frame::data(vec![b' '; self.1].into()))))
        }
    }

    #[tokio::test]
    async fn bodies_together_take_no_more_than_the_room() {
        let room = Room::new(1000);
        let first = gather(Coming(3, 200), 1000, &room).await.unwrap();
        assert_eq!(first.bytes.len(), 600);
        assert_eq!(gather(Coming(3, 200), 1000, &room).await.unwrap_err(), BodyError::NoRoom);
        // What was refused holds nothing.
        let second = gather(Coming(2, 200), 1000, &room).await.unwrap();
        assert_eq!(gather(Coming(1, 1), 1000, &room).await.unwrap_err(), BodyError::NoRoom);
        drop(first);
        assert!(gather(Coming(3, 200), 1000, &room).await.is_ok());
        drop(second);
        assert_eq!(gather(Coming(2, 200), 300, &room).await.unwrap_err(), BodyError::TooLarge { limit: 300 });
        assert_eq!(room.0.available_permits(), 1000);
    }

    #[test]
    fn only_json_is_json() {
        for (value, expected) in [
            ("application/json", true),
            ("Application/JSON; charset=\"UTF-8\"", true),
            ("application/json; charset=utf-16", false),
            ("application/json-patch+json", false),
            ("text/json", false),
            ("", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, value.parse().expect("a header value"));
            assert_eq!(is_json(&headers), expected, "{value}");
        }
        let mut twice = HeaderMap::new();
        twice.append(header::CONTENT_TYPE, "application/json".parse().expect("a value"));
        twice.append(header::CONTENT_TYPE, "text/plain".parse().expect("a value"));
        assert!(!is_json(&twice));
        assert!(!is_json(&HeaderMap::new()));
    }
}
