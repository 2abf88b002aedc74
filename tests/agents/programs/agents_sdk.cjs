// The OpenAI Agents SDK for JavaScript, by its default: Responses; streamed, with a calculator for up
// to four calls.
const { Agent, MaxTurnsExceededError, run, tool } = require("@openai/agents");
const { calculate, description, parameters, printReward } = require("./calculator.cjs");

async function main() {
  const task = JSON.parse(process.argv[2]);
  const calc = tool({
    name: "calc",
    description,
    parameters: { ...parameters, additionalProperties: true },
    strict: false,
    execute: calculate,
  });
  const solver = new Agent({ name: "solver", model: "default", tools: [calc] });
  const question = task.messages.at(-1).content;
  const result = await run(solver, question, { stream: true, maxTurns: 4 });
  try {
    await result.completed;
  } catch (error) {
    if (!(error instanceof MaxTurnsExceededError)) throw error; // else the policy's own mistake
  }
  printReward(result.finalOutput ?? "", task.answer);
}

main();
