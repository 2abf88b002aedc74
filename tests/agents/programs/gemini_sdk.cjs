// Google's Gen AI SDK for Node: streamed, with a calculator for up to four calls.
const { GoogleGenAI } = require("@google/genai");
const { calculate, description, parameters, printReward } = require("./calculator.cjs");

async function main() {
  const task = JSON.parse(process.argv[2]);
  const client = new GoogleGenAI({ apiKey: process.env.GEMINI_API_KEY });
  const calc = { name: "calc", description, parametersJsonSchema: parameters };
  const config = { tools: [{ functionDeclarations: [calc] }] };
  const contents = task.messages.map(({ content }) => ({ role: "user", parts: [{ text: content }] }));
  for (let turn = 0; turn < 4; turn++) {
    const stream = await client.models.generateContentStream({ model: "any", contents, config });
    const parts = [];
    for await (const chunk of stream) parts.push(...(chunk.candidates?.[0]?.content?.parts ?? []));
    contents.push({ role: "model", parts });
    const calls = parts.flatMap((part) => part.functionCall ?? []);
    const text = parts.map((part) => part.text ?? "").join("");
    if (!calls.length) return printReward(text, task.answer);
    const answers = calls.map(({ id, name, args }) => ({
      functionResponse: { id, name, response: { result: calculate(args ?? {}) } },
    }));
    contents.push({ role: "user", parts: answers });
  }
  printReward("", task.answer);
}

main();
