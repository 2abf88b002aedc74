// The Vercel AI SDK with its OpenAI provider, which calls Responses: streamed, with a calculator for
// up to four calls.
const { jsonSchema, stepCountIs, streamText, tool } = require("ai");
const { openai } = require("@ai-sdk/openai");
const { calculate, description, parameters, printReward } = require("./calculator.cjs");

async function main() {
  const task = JSON.parse(process.argv[2]);
  const calc = tool({ description, inputSchema: jsonSchema(parameters), execute: calculate });
  const result = streamText({
    model: openai("default"),
    messages: task.messages,
    tools: { calc },
    stopWhen: stepCountIs(4),
    maxRetries: 0,
    onError: ({ error }) => {
      throw error;
    },
  });
  printReward(await result.text, task.answer);
}

main();
