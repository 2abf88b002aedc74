"""Ready agents on LangChain: `workflow=areal_sub.workflow.langchain.math_agent.<Class>`."""
