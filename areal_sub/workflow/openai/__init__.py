"""Ready agents on the OpenAI SDK: `workflow=areal_sub.workflow.openai.<module>.<Class>`."""
