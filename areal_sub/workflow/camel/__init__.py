"""Ready agents on CAMEL-AI: `areal_sub.workflow.camel.math_agent.<Class>`."""
