"""Ready agents on the OpenAI SDK. Name one as `workflow=areal_sub.workflow.openai.<module>.<Class>`."""
