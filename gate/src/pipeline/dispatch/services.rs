//! What an execution can talk to while it runs: the proxy's session and the resolver's, in the gate's own network
//! namespace or in one that nothing else is in.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;

use crate::egress::flow::FlowRecord;
use crate::egress::kernel::KernelProfile;
use crate::egress::names::{Execution, Isolated, NameTable, OpenNames, OverTcp};
use crate::egress::profile::Profile;
use crate::egress::proxy::{DnsOverTcp, Duplex, Names, OpenSession, Session};
use crate::egress::{LeafId, kernel};
use crate::gate::Gate;
use crate::pipeline::dispatch::held::Hold;
use crate::sandbox::{NamespaceListeners, Network};

/// The open services of one execution. Dropped, they end.
pub struct Services<'a> {
    gate: &'a Gate,
    leaf: LeafId,
    offered: Session,
    /// The decision id that the first connection is decided under.
    first_decision: Option<String>,
    session: Option<OpenSession>,
    names: Option<OpenNames>,
}

impl<'a> Services<'a> {
    /// Opens what `profile` needs. In the gate's own namespace the proxy serves at once; in another it serves once that
    /// is there ([`Self::listen`]).
    pub fn open(gate: &'a Gate, leaf: LeafId, hold: Hold<'_>) -> Self {
        let Hold { owner, profile, network, first_decision, lasts, .. } = hold;
        let profile = Arc::new(profile.clone());
        let names = (!profile.is_none()).then(|| {
            let execution = Execution {
                execution_id: owner.execution_id.clone(),
                action_id: owner.action_id.clone(),
                principal: owner.principal.clone(),
                workspace: owner.workspace.clone(),
                profile: Arc::clone(&profile),
            };
            gate.dns.open(leaf, execution)
        });
        let offered = Session {
            execution_id: owner.execution_id,
            action_id: owner.action_id,
            principal: owner.principal,
            workspace: owner.workspace,
            profile,
            names: names.as_ref().map(|names| Arc::new(Table(names.table())) as Arc<dyn Names>),
            lasts,
            dns: names.as_ref().map(|names| Arc::new(Streams(names.over_tcp())) as Arc<dyn DnsOverTcp>),
        };
        let mut services = Self { gate, leaf, offered, first_decision, session: None, names };
        if network == Network::Shared {
            let session = gate.proxy.open(leaf, services.offered.clone());
            services.take_session(session);
        }
        services
    }

    /// Serves the sockets of the execution's own namespace. A profile of none is served by nobody: they are closed.
    pub fn listen(&mut self, listeners: NamespaceListeners) -> io::Result<()> {
        let Some(names) = &mut self.names else { return Ok(()) };
        let attribution = Arc::clone(&self.gate.enforcer) as Arc<dyn crate::egress::DatagramAttribution>;
        let isolated = Isolated { attribution: Some(attribution), netns: Some(listeners.netns_cookie) };
        names.serve_isolated(listeners.udp, &isolated)?;
        let session = self.gate.proxy.open_with_listeners(self.leaf, self.offered.clone(), listeners.tcp)?;
        self.take_session(session);
        Ok(())
    }

    fn take_session(&mut self, session: OpenSession) {
        if let Some(decision_id) = &self.first_decision {
            session.decide_first_as(decision_id);
        }
        self.session = Some(session);
    }

    /// Ends both, and gives what was recorded.
    pub async fn close(self) -> Vec<FlowRecord> {
        let mut flows = match self.session {
            Some(session) => session.close().await,
            None => Vec::new(),
        };
        if let Some(names) = self.names {
            flows.extend(names.close().await.flows);
        }
        flows
    }
}

/// Admits a leaf with all that its profile names by address; names get theirs as they are asked for.
pub fn admit(
    gate: &Gate,
    leaf: LeafId,
    profile: &Profile,
    deadline: std::time::Duration,
) -> Result<(), kernel::KernelError> {
    let kind = if profile.is_none() { KernelProfile::None } else { KernelProfile::Allowlist };
    gate.enforcer.admit(leaf, kind, deadline)?;
    for (address, prefix, ports) in profile.networks() {
        gate.enforcer.reach(leaf, (address, prefix), ports)?;
    }
    Ok(())
}

/// What stand-ins stand for, as the proxy asks.
struct Table(Arc<NameTable>);

impl Names for Table {
    fn name_of(&self, address: Ipv4Addr) -> Option<String> {
        self.0.name_of(address).map(|name| name.as_str().to_owned())
    }
}

/// Queries over streams that the proxy has taken.
struct Streams(OverTcp);

impl DnsOverTcp for Streams {
    fn serve<'a>(
        &'a self,
        stream: &'a mut dyn Duplex,
        client: SocketAddr,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(self.0.serve(stream, client))
    }
}
