"""Ready agents on the OpenAI Agents SDK: `areal_sub.workflow.openai_agents.math_agent.<Class>`."""
