//! HTTP of a client that does not know of the proxy: in the clear, or after its TLS was ended here. Every request of the
//! connection is parsed, held to the name that was asked for and to the methods of the entry, and written anew from
//! what was parsed; the next one is read when the one before is answered.

use tokio::time::timeout;

use super::client::Client;
use super::count::Counted;
use super::forward::{self, Outcome};
use super::leg::Up;
use super::reply::Reply;
use super::request::{Forward, Refused};
use super::source::ReadError;
use super::tunnel::{self, Way};
use crate::egress::flow::{End, NameVerified, Protocol};

pub async fn serve(way: &Way<'_>, mut client: Client, mut dialled: Option<Counted>, secure: bool) -> End {
    let connection = way.connection;
    let scheme = if secure { Protocol::Https } else { Protocol::Http };
    connection.spoken(scheme);
    let mut up: Option<Up> = None;
    loop {
        let head = match next_head(way, &mut client, up.as_mut()).await {
            Ok(Some(head)) => head,
            Ok(None) => {
                if let Some(up) = up {
                    up.finish();
                }
                return client.close(connection, End::Closed).await;
            }
            Err(Some(reply)) => return client.refuse(connection, &reply).await,
            Err(None) => return End::ClientFailed,
        };
        let request = match Forward::inside(&head, &way.target.host, way.target.port, scheme) {
            Ok(request) => request,
            Err(Refused::Invalid(error)) => {
                return client.answer(connection, &Reply::Invalid { message: error.to_string() }, false).await;
            }
            Err(Refused::OtherHost) => {
                let reply =
                    Reply::denied("host_mismatch", "the Host of the request is not the name that was asked for");
                return client.answer(connection, &reply, false).await;
            }
        };
        let head_only = request.method == "HEAD";
        if let Err(reply) = way.permit.allows_method(&request.method) {
            return client.answer(connection, &reply, head_only).await;
        }
        connection.verified(Some(NameVerified::Host), false);
        let origin = match up.take() {
            Some(origin) => origin,
            None => match tunnel::open(way, dialled.take(), secure).await {
                Ok(leg) => Up::new(leg),
                Err(reply) => return client.answer(connection, &reply, head_only).await,
            },
        };
        match forward::exchange(connection, client, origin, &request).await {
            Outcome::Over(end) => return end,
            Outcome::Again(same, origin) => {
                client = same;
                up = Some(origin);
            }
        }
    }
}

/// The next head; `None` when either side has ended. Between requests the origin has nothing to say: what it sends
/// then is nobody's answer.
async fn next_head(way: &Way<'_>, client: &mut Client, up: Option<&mut Up>) -> Result<Option<Vec<u8>>, Option<Reply>> {
    let limit = way.means.limits.head_time;
    match up {
        Some(up) => tokio::select! {
            biased;
            _ = up.source.some() => return Ok(None),
            more = client.source.some() => {
                more.map_err(|_| None)?;
            }
        },
        None => {
            timeout(limit, client.source.some()).await.map_err(|_| Some(Reply::Slow))?.map_err(|_| None)?;
        }
    }
    match timeout(limit, client.source.head()).await {
        Err(_) => Err(Some(Reply::Slow)),
        Ok(Ok(head)) => Ok(head),
        Ok(Err(ReadError::Malformed(error))) => Err(Some(Reply::Invalid { message: error.to_string() })),
        Ok(Err(_)) => Err(None),
    }
}
