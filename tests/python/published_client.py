"""What the published client, as it is on PyPI, sees of a gate. Run by tests/tests/published_client.rs.

usage: published_client.py SCENARIO JSON. A scenario that needs something done outside says so in a line on standard
output and goes on when a line comes on standard input.
"""

import asyncio
import importlib.metadata
import json
import os
import sys
from datetime import datetime, timedelta, timezone

import latchgate
from latchgate import LatchGateClient
from latchgate._crypto import DPoPKeyPair


async def refused(kind, call):
    """The exception of exactly this class that the call raises."""
    try:
        got = await call
    except latchgate.LatchGateError as error:
        assert type(error) is kind, f"{kind.__name__} was expected, not {error!r}"
        return error
    raise AssertionError(f"{kind.__name__} was expected, not {got!r}")


def tell(word):
    print(word, flush=True)
    assert sys.stdin.readline(), "nobody answers"


async def whole_round(client, url, principal):
    """Execute, receipt, egress profile, approval: everything that the client can do."""
    async with client:
        assert client.session_id is None
        result = await client.execute("fetch", {"url": url})
        assert client.session_id and client.lease_jti
        data = result.output["data"]
        assert result.output["ok"] is True and data["status_code"] == 200 and data["body"] == "hello", data
        assert data["headers"]["content-type"] == "text/plain" and data["url"] == url, data
        assert result.verification == {"outcome": "verified", "is_fully_successful": True}, result.verification
        assert set(result.runtime) >= {"duration_ms", "exit_code", "fuel_consumed"} and result.runtime["exit_code"] == 0
        assert result.trace_id

        receipt = await client.get_receipt(result.receipt_id)
        assert receipt.is_fully_successful, receipt
        assert (receipt.receipt_id, receipt.grant_id) == (result.receipt_id, result.grant_id)
        assert receipt.provider_module_digest.startswith("sha256:") and len(receipt.result_hash) == 64
        assert receipt.failure_class is None
        started, finished = (
            datetime.fromisoformat(at.replace("Z", "+00:00")) for at in (receipt.started_at, receipt.finished_at)
        )
        assert timedelta(0) <= finished - started < timedelta(minutes=1)

        # The second call is made under the same lease.
        lease = client.lease_jti
        again = await client.execute("fetch", {"url": url})
        assert client.lease_jti == lease and again.receipt_id != result.receipt_id

        egress = await client.get_action_egress("fetch")
        assert egress.profile == "proxy_allowlist" and egress.has_egress and egress.allowed_domains == ["origin.test"]
        egress = await client.get_action_egress("echo")
        assert egress.profile == "none" and not egress.has_egress

        error = await refused(latchgate.LatchGateDenied, client.get_approval_status("no-such-approval"))
        assert "not found" in error.reason
        error = await refused(latchgate.LatchGateDenied, client.get_receipt("no-such-receipt"))
        assert "not found" in error.reason
        error = await refused(latchgate.LatchGateDenied, client.get_action_egress("no-such-action"))
        assert "not found" in error.reason


async def transports(at):
    url, agent = at["url"], {"agent_id": "an-agent"}
    os.environ["XDG_RUNTIME_DIR"] = at["runtime"]
    os.environ.pop("LATCHGATE_URL", None)
    await whole_round(LatchGateClient(**agent), url, "default")
    await whole_round(LatchGateClient(socket=at["socket"], **agent), url, "tester")
    # The claim that the client's own documentation asks for.
    await whole_round(LatchGateClient(socket=at["socket"], public_base_url="http://localhost:3000", **agent), url, "")
    await whole_round(LatchGateClient(socket=at["socket"], public_base_url="https://gate.example/", **agent), url, "")
    await whole_round(LatchGateClient(base_url=at["tcp"], **agent), url, "over-tcp")
    os.environ["LATCHGATE_URL"] = at["tcp"] + "/"
    await whole_round(LatchGateClient(**agent), url, "over-tcp")
    # One principal's receipt is as absent for another as one that never was.
    del os.environ["LATCHGATE_URL"]
    async with (
        LatchGateClient(base_url=at["tcp"], **agent) as tcp,
        LatchGateClient(socket=at["socket"], **agent) as uds,
    ):
        result = await uds.execute("echo", {"word": "mine"})
        assert result.output == {"word": "mine"}
        assert (await uds.get_receipt(result.receipt_id)).is_fully_successful
        await refused(latchgate.LatchGateDenied, tcp.get_receipt(result.receipt_id))


async def exceptions(at):
    def client(**more):
        return LatchGateClient(socket=at["socket"], **more)

    async with client() as agent:
        await refused(latchgate.LatchGateNotConnected, agent.execute("echo", {}))
        await agent.connect(agent_id="named-later")
        assert (await agent.execute("echo", {"word": "x"})).output == {"word": "x"}

        # Denied: by policy, by the profile, by the schema, by strict JSON, by scope.
        error = await refused(latchgate.LatchGateDenied, agent.execute("risky", {}))
        assert error.reason.startswith("policy_denied: requires_approval"), error.reason
        error = await refused(latchgate.LatchGateDenied, agent.execute("fetch", {"url": "https://elsewhere.test/"}))
        assert error.reason.startswith("egress_denied: "), error.reason
        error = await refused(latchgate.LatchGateDenied, agent.execute("fetch", {"url": 7}))
        assert error.reason.startswith("schema_violation: /url"), error.reason
        error = await refused(latchgate.LatchGateDenied, agent.execute("echo", {"word": 2**53 + 1}))
        assert error.reason.startswith("schema_violation: /word"), error.reason
        error = await refused(latchgate.LatchGateDenied, agent.execute("echo", {"word": float("nan")}))
        assert error.reason in ("invalid_request",) or error.reason.startswith("schema_violation"), error.reason
        error = await refused(latchgate.LatchGateDenied, agent.execute("scoped", {}))
        assert error.reason == "scope_not_permitted: missing scope: files:write", error.reason
        await refused(latchgate.LatchGateDenied, agent.connect(scopes=["tools:call", "root:everything"]))

        # Unavailable: no such action, too much, a failing action, a sandbox that cannot be made.
        error = await refused(latchgate.LatchGateUnavailable, agent.execute("no-such-action", {}))
        assert error.detail == "unexpected status 404: action_not_found", error.detail
        error = await refused(latchgate.LatchGateUnavailable, agent.execute("echo", {"word": "x" * 70_000}))
        assert error.detail == "unexpected status 413: payload_too_large", error.detail
        for action in ("failing", "missing"):
            error = await refused(latchgate.LatchGateUnavailable, agent.execute(action, {}))
            assert error.detail == "action_execution_failed", error.detail
        # None of that has cost the lease.
        assert (await agent.execute("echo", {})).output == {}

    # The budget that a lease sets itself is spent, and connecting anew starts afresh.
    async with client() as agent:
        await agent.connect(agent_id="thrifty", max_calls=2)
        await agent.execute("echo", {})
        await refused(latchgate.LatchGateDenied, agent.execute("risky", {}))
        await agent.execute("echo", {})
        await refused(latchgate.LatchGateBudgetExhausted, agent.execute("echo", {}))
        await agent.connect(max_cost_usd_cents=0)
        await refused(latchgate.LatchGateBudgetExhausted, agent.execute("echo", {}))
        await agent.connect()
        await agent.execute("echo", {})

    # Authentication.
    async with client(agent_id="a") as agent, client(agent_id="b") as other:
        await agent.connect()
        await other.connect()
        lease, keys = agent._lease_jwt, agent._keypair
        agent._lease_jwt = lease[:-8] + ("A" if lease[-8] != "A" else "B") + lease[-7:]
        error = await refused(latchgate.LatchGateAuthError, agent.execute("echo", {}))
        assert error.code == "invalid_lease", error.code
        agent._lease_jwt, agent._keypair = lease, DPoPKeyPair.generate()
        error = await refused(latchgate.LatchGateAuthError, agent.execute("echo", {}))
        assert error.code == "invalid_dpop", error.code
        agent._lease_jwt, agent._keypair = other._lease_jwt, keys
        error = await refused(latchgate.LatchGateAuthError, agent.execute("echo", {}))
        assert error.code == "invalid_dpop", error.code
        agent._lease_jwt, agent._keypair = lease, keys
        agent._public_base_url = "http://somewhere.else"
        error = await refused(latchgate.LatchGateAuthError, agent.execute("echo", {}))
        assert error.code == "invalid_dpop", error.code
        agent._public_base_url = "http://localhost"
        await agent.execute("echo", {})
    async with client(agent_id="a") as agent, LatchGateClient(base_url=at["tcp"], agent_id="a") as tcp:
        await agent.connect()
        await tcp.execute("echo", {})
        tcp._lease_jwt, tcp._keypair = agent._lease_jwt, agent._keypair
        error = await refused(latchgate.LatchGateAuthError, tcp.execute("echo", {}))
        assert error.code == "invalid_lease", error.code

    # A proof that is sent twice.
    async with client(agent_id="replayer") as agent:
        honest, kept = agent._dpop_headers, {}
        agent._dpop_headers = lambda method, path: kept.setdefault((method, path), honest(method, path))
        result = await agent.execute("echo", {})
        error = await refused(latchgate.LatchGateReplayDetected, agent.execute("echo", {}))
        assert error.code == "replay_detected"
        assert (await agent.get_receipt(result.receipt_id)).is_fully_successful
        await refused(latchgate.LatchGateReplayDetected, agent.get_receipt(result.receipt_id))
        agent._dpop_headers = honest
        await agent.execute("echo", {})

    # Nobody there.
    async with LatchGateClient(socket=at["socket"] + ".not", agent_id="a") as agent:
        await refused(latchgate.LatchGateTransportError, agent.execute("echo", {}))
    async with client(agent_id="impatient", timeout=1.0) as agent:
        await agent.execute("echo", {})
        await refused(latchgate.LatchGateTransportError, agent.execute("slow", {}))
        await agent.execute("echo", {})


async def nobody(at):
    """A TCP listener without an identity serves nobody."""
    async with LatchGateClient(base_url=at["tcp"], agent_id="a") as agent:
        error = await refused(latchgate.LatchGateAuthError, agent.execute("echo", {}))
        assert error.code == "identity_unauthenticated", error.code
    async with LatchGateClient(socket=at["socket"], agent_id="a") as agent:
        await agent.execute("echo", {})


async def expiry(at):
    """The lease lives for four seconds, and the client would renew it at once: it is told that it has time."""
    async with LatchGateClient(socket=at["socket"], agent_id="a") as agent:
        await agent.connect()
        expires = agent._lease_expires_at
        agent._lease_expires_at = expires + timedelta(hours=1)
        first = agent.lease_jti
        await agent.execute("echo", {})
        await asyncio.sleep((expires - datetime.now(tz=timezone.utc)).total_seconds() + 0.1)
        error = await refused(latchgate.LatchGateLeaseExpired, agent.execute("echo", {}))
        assert error.code == "lease_expired" and agent.lease_jti == first
        await agent.connect()
        await agent.execute("echo", {})


async def renewal(at):
    """Leases live for 61 seconds, so that the client renews from the second second on."""
    async with LatchGateClient(socket=at["socket"], agent_id="a") as agent:
        await agent.connect()
        seen = {agent.lease_jti}
        threshold = agent._lease_expires_at - timedelta(seconds=60)
        for _ in range(2):
            await asyncio.sleep((threshold - datetime.now(tz=timezone.utc)).total_seconds() + 0.05)
            old_keys = agent._keypair
            result = await agent.execute("echo", {"word": "renewed"})
            assert agent.lease_jti not in seen and agent._keypair is not old_keys
            seen.add(agent.lease_jti)
            threshold = agent._lease_expires_at - timedelta(seconds=60)
            assert (await agent.get_receipt(result.receipt_id)).is_fully_successful
        # The operator's three calls an hour are not refilled by any of this.
        await agent.execute("echo", {})
        await refused(latchgate.LatchGateBudgetExhausted, agent.execute("echo", {}))
        await agent.connect(max_calls=1000)
        await refused(latchgate.LatchGateBudgetExhausted, agent.execute("echo", {}))
    async with LatchGateClient(socket=at["socket"], agent_id="another-name") as agent:
        await refused(latchgate.LatchGateBudgetExhausted, agent.execute("echo", {}))


async def concurrent(at):
    async with LatchGateClient(socket=at["socket"], agent_id="busy", timeout=120) as agent:
        calls = [agent.execute("echo", {"word": f"call {n}"}) for n in range(100)]
        results = await asyncio.gather(*calls)
        assert [result.output["word"] for result in results] == [f"call {n}" for n in range(100)]
        assert len({result.receipt_id for result in results}) == 100 == len({result.grant_id for result in results})
        receipts = await asyncio.gather(*(agent.get_receipt(result.receipt_id) for result in results))
        assert all(receipt.is_fully_successful for receipt in receipts)
        assert [receipt.grant_id for receipt in receipts] == [result.grant_id for result in results]


async def restart(at):
    async with LatchGateClient(socket=at["socket"], agent_id="patient") as agent:
        before = await agent.execute("echo", {"word": "before"})
        lease = agent.lease_jti
        for way in ("stop", "kill"):
            tell(way)
            await refused(latchgate.LatchGateTransportError, agent.execute("echo", {}))
            tell("start")
            after = await agent.execute("echo", {"word": way})
            assert after.output == {"word": way} and agent.lease_jti == lease
            assert (await agent.get_receipt(before.receipt_id)).is_fully_successful


async def origins(at):
    async with LatchGateClient(socket=at["socket"], agent_id="reader", timeout=60) as agent:
        base = at["base"]

        async def fetch(path, origin=base):
            return (await agent.execute("fetch", {"url": origin + path})).output["data"]

        data = await fetch("/headers")
        assert data["status_code"] == 200 and data["body"] == "ok", data
        headers = data["headers"]
        assert headers["x-one"] == "1" and headers["x-many"] == "a, b", headers
        assert headers["set-cookie"] == "k=v; Path=/\nl=w, x" and headers["x-latin"] == "caf\u00e9", headers
        assert not {"connection", "transfer-encoding"} & set(headers), headers

        data = await fetch("/bytes")
        assert data["body_encoding"] == "base64" and data["body"] == "/wD+gA==", data

        # A redirect is an answer: nobody goes there.
        data = await fetch("/redirect")
        assert data["status_code"] == 302 and data["headers"]["location"] == at["other"] + "/", data
        data = await fetch("/teapot")
        assert data["status_code"] == 418, data

        # What marks the proxy's own answers cannot be forged by an origin.
        data = await fetch("/forged")
        assert data["status_code"] == 403 and "latchgate-decision-id" not in data["headers"], data

        # As long as it may be, and one byte longer.
        data = await fetch("/large/65536")
        assert len(data["body"]) == 65536
        for path in ("/large/65537", "/endless"):
            error = await refused(latchgate.LatchGateUnavailable, agent.execute("fetch", {"url": base + path}))
            assert error.detail == "action_execution_failed", error.detail

        # The same origin under a name that its certificate has, and under one that it has not.
        assert (await fetch("/", base))["body"] == "hello"
        error = await refused(latchgate.LatchGateUnavailable, agent.execute("fetch", {"url": at["wrong_name"] + "/"}))
        assert error.detail == "action_execution_failed", error.detail
        error = await refused(latchgate.LatchGateUnavailable, agent.execute("fetch", {"url": at["stranger"] + "/"}))
        assert error.detail == "action_execution_failed", error.detail

        assert (await agent.execute("hasty", {"url": base + "/"})).output["data"]["body"] == "hello"
        error = await refused(latchgate.LatchGateUnavailable, agent.execute("hasty", {"url": base + "/never"}))
        assert error.detail == "action_execution_failed", error.detail


def main():
    assert importlib.metadata.version("latchgate") == latchgate.__version__ == "0.2.0"
    scenario, at = sys.argv[1], json.loads(sys.argv[2])
    asyncio.run(globals()[scenario](at))
    print("done", flush=True)


main()
