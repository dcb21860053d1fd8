// The search runs in a Worker, which browsers refuse to pages that are opened from a disk. There, a frame does its work.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.early = []
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.append(this.frame)
      const inside = this.frame.contentWindow
      inside.importScripts = (...urls) => {
        let loaded = Promise.resolve()
        for (const one of urls) loaded = loaded.then(() => this.load(inside, new URL(one, url)))
        return loaded
      }
      inside.postMessage = data => setTimeout(() => this.dispatchEvent(new MessageEvent("message", { data })))
      this.load(inside, url).then(() => {
        for (const data of this.early) this.deliver(data)
        this.early = null
      })
    }
    load(inside, url) {
      return new Promise((done, failed) => {
        const script = inside.document.createElement("script")
        script.src = url
        script.onload = done
        script.onerror = failed
        inside.document.head.append(script)
      })
    }
    deliver(data) {
      const inside = this.frame.contentWindow
      inside.dispatchEvent(new inside.MessageEvent("message", { data }))
    }
    postMessage(data) {
      if (this.early) this.early.push(data)
      else this.deliver(data)
    }
    terminate() {
      this.frame.remove()
    }
  }
