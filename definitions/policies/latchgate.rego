# The gate's default policy: nothing is allowed but what gets through every check, in this order.
#
#   digest   the action is the one that was registered
#   acl      the principal is known, may call the action, and may cause the side effects that it declares
#   scope    the lease carries tools:call and whatever else the action asks for
#   budget   there are calls left, where they are counted
#   risk     low is allowed; medium is allowed if the ACL names the action; high and critical wait for a person
#
# data.acl has an entry a principal; a principal without one has the entry "*". An entry:
#
#   allowed_actions  action ids. A medium action must be among them; a low one need not, unless only_named is true.
#   denied_actions   action ids that are refused whatever else is said.
#   only_named       true: low, high and critical actions too must be named.
#   allowed_sinks    side effects that an action may declare; left out, any.
package latchgate

import rego.v1

default decision := {"allow": false, "deny_reason": "no rule of the policy allows this"}

decision := {"allow": false, "deny_reason": reason} if {
	reason := concat("; ", sort(refusals))
	reason != ""
} else := held if {
	needs_a_person
} else := allowed if {
	input.action_risk_level in {"low", "medium"}
}

allowed := {
	"allow": true,
	"requires_approval": false,
	"allowed_sinks": input.requested_sinks,
	"approved_secrets": input.requested_secrets,
	"approved_egress": input.egress_profile,
}

held := object.union(allowed, {"requires_approval": true, "approvers_required": 1})

# Digest.

refusals contains "the action is not the one that was registered" if not digest_ok

digest_ok if input.action_trust_verdict == "digest_ok"

# ACL.

entry := data.acl[input.principal]

entry := data.acl["*"] if not data.acl[input.principal]

refusals contains "the principal is not in the ACL" if not is_object(entry)

refusals contains "the ACL denies this action to the principal" if input.action_id in entry.denied_actions

refusals contains "the ACL does not name this action for the principal" if {
	is_object(entry)
	must_be_named
	not named
}

must_be_named if input.action_risk_level == "medium"

must_be_named if entry.only_named

named if input.action_id in entry.allowed_actions

refusals contains "the ACL does not allow the side effects of this action" if {
	some sink in input.requested_sinks
	entry.allowed_sinks
	not sink in entry.allowed_sinks
}

# Scope.

refusals contains "the lease does not carry the scope tools:call" if not "tools:call" in input.scopes

refusals contains sprintf("the lease does not carry the scope %s", [scope]) if {
	some scope in input.required_scopes
	scope != "tools:call"
	not scope in input.scopes
}

# Budget.

refusals contains "no calls are left" if input.budgets_before.calls_remaining <= 0

# Risk.

needs_a_person if input.action_risk_level in {"high", "critical"}

needs_a_person if count(input.unresolved_domains) > 0
