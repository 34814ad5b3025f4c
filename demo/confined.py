"""The same agent under `latchgate confine`: the gate is the only way out, and nothing goes around it."""

import asyncio
import socket
import sys

from latchgate import LatchGateClient


def around(address: str) -> str:
    """What the kernel says to a connection that does not go through the gate."""
    try:
        with socket.create_connection((address, 443), timeout=3):
            return "connected"
    except OSError as error:
        return error.strerror or str(error)


async def main() -> int:
    async with LatchGateClient(agent_id="demo-agent") as client:
        fetched = await client.execute("http_fetch", {"url": "https://origin.demo.test/hello"})
    said = around(sys.argv[1])
    print("\n== An agent that is held itself: through the gate, and around it")
    print(f"through the gate: status {fetched.output['data']['status_code']}\naround it: {said}")
    return 0 if said == "Operation not permitted" else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
