"""Ready agent on the Anthropic SDK: `areal_sub.workflow.anthropic.math_agent.MathAgent`."""
