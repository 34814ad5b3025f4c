"""What an agent author writes, with the published client: no argument but `agent_id`."""

import asyncio
import json
import pathlib
import sys

from latchgate import LatchGateClient, LatchGateDenied


def say(title: str, text: object) -> None:
    print(f"\n== {title}\n{text}")


def return_receipt(receipt_id: str) -> None:
    """Leaves the id for the script that called this one."""
    pathlib.Path(sys.argv[1]).write_text(receipt_id, encoding="ascii")


async def main() -> int:
    async with LatchGateClient(agent_id="demo-agent") as client:
        allowed = await client.execute("http_fetch", {"url": "https://origin.demo.test/hello"})
        say("An allowed call, and what it brought back", json.dumps(allowed.output["data"], indent=2))
        receipt = await client.get_receipt(allowed.receipt_id)
        say("Its receipt", f"{allowed.receipt_id}: fully successful = {receipt.is_fully_successful}")
        if not receipt.is_fully_successful:
            return 1

        try:
            await client.execute("http_fetch", {"url": "https://elsewhere.demo.test/"})
        except LatchGateDenied as refused:
            say("A name outside the action's profile: the gate's 403", f"LatchGateDenied: {refused}")
        else:
            print("the forbidden call was not refused", file=sys.stderr)
            return 1

        around = await client.execute("curl_around", {})
        say("curl past the proxy, in the sandbox: the kernel's answer", json.dumps(around.output))
        if around.output["curl_said"] != "Operation not permitted":
            print("curl was not refused by the kernel", file=sys.stderr)
            return 1
        return_receipt(around.receipt_id)
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
