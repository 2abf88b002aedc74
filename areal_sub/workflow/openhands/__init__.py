"""Ready agents on the OpenHands SDK: `areal_sub.workflow.openhands.math_agent.<Class>`."""
