// A field, a file of any size and a batch with Node's own fetch.
// Usage: node node.mjs FILE, with KEYFOLD_URL and KEYFOLD_API_KEY set.
import assert from 'node:assert/strict'
import { createReadStream, createWriteStream } from 'node:fs'
import { rename } from 'node:fs/promises'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'

const { KEYFOLD_URL: url, KEYFOLD_API_KEY: key } = process.env
const authorization = `Bearer ${key}`

async function call(path, body) {
    const response = await fetch(url + path, {
        method: 'POST',
        headers: { authorization, 'content-type': 'application/json' },
        body: JSON.stringify(body),
    })
    const answer = await response.json()
    if (!response.ok) throw new Error(`${answer.code}: ${answer.detail}`)
    return answer
}

async function field() {
    // The context binds the ciphertext to its row: it opens nowhere else.
    const context = { table: 'people', column: 'name', row: '42' }
    const plaintext = Buffer.from('Ada Lovelace').toString('base64')
    const { ciphertext } = await call('/v1/encrypt', { plaintext, context })
    const opened = await call('/v1/decrypt', { ciphertext, context })
    assert.equal(Buffer.from(opened.plaintext, 'base64').toString(), 'Ada Lovelace')
}

async function stream(path, source, target) {
    const response = await fetch(url + path, {
        method: 'POST',
        headers: { authorization, 'content-type': 'application/octet-stream', 'keyfold-context': 'name="report"' },
        body: Readable.toWeb(createReadStream(source)),
        duplex: 'half',
    })
    if (!response.ok) throw new Error(`${(await response.json()).code}`)
    // A broken transfer throws here, and the file never gets its name.
    await pipeline(Readable.fromWeb(response.body), createWriteStream(`${target}.part`))
    await rename(`${target}.part`, target)
}

async function batch() {
    const items = Array.from({ length: 1000 }, (_, n) => ({
        ref: `row-${n}`,
        plaintext: Buffer.from(String(n)).toString('base64'),
    }))
    const answer = await call('/v1/encrypt/batch', { items })
    // Each item has its own outcome: `ciphertext`, or `error` with a code.
    assert.equal(answer.failed, 0)
    assert.deepEqual(answer.items.map((item) => item.ref), items.map((item) => item.ref))
}

const file = process.argv[2]
await field()
await batch()
await stream('/v1/encrypt', file, `${file}.kf`)
await stream('/v1/decrypt', `${file}.kf`, `${file}.out`)
console.log('field, file and batch: done')
